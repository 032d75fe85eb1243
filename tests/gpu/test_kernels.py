"""Triton kernels on a GPU, against the oracles of their operations."""

import os
import subprocess
import sys

import pytest

from tests.pallas_kernels.test_triton import OPERATIONS, SLOW

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize("operation", [*OPERATIONS, *SLOW])
def test_on_the_device(operation: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.on_device", operation],
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"ok"}
