"""Triton kernels in Triton's interpreter, against the oracles of their operations."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

OPERATIONS = (
    "add_rms_norm",
    "compress_tokens",
    "grouped_matmul",
    "joint_attention",
    "latent_attention",
    "linear",
    "mla_attention",
    "ragged_paged_attention",
    "rotate_and_write",
    "route_experts",
    "select_tokens",
)
SLOW = ("norm_and_rotate", "read_streams", "sparse_mla_attention")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "operation", [*OPERATIONS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_interpreted(operation: str) -> None:
    cases = importlib.import_module(f"tests.pallas_kernels.test_{operation}").INTERPRETED
    done = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.interpreted", operation],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ok"] * len(cases)
