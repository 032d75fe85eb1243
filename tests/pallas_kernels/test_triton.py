"""Triton kernels in Triton's interpreter, against the oracles of their operations."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
OPERATIONS = (
    "add_rms_norm",
    "log_softmax_rows",
    "mla_attention",
    "ragged_paged_attention",
    "rms_norm",
    "rotate_and_write",
    "route_experts",
    "silu_mul",
)
SLOW = (
    "compress_tokens",
    "grouped_matmul",
    "joint_attention",
    "latent_attention",
    "linear",
    "norm_and_rotate",
    "read_streams",
    "select_tokens",
    "sparse_mla_attention",
)


def test_interpreted() -> None:
    """In one process: to start one takes as long as most operations."""
    check(*OPERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("operation", SLOW)
def test_interpreted_slowly(operation: str) -> None:
    check(operation)


def check(*operations: str) -> None:
    tests = [importlib.import_module(f"tests.pallas_kernels.test_{name}") for name in operations]
    done = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.interpreted", *operations],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split().count("ok") == sum(len(test.INTERPRETED) for test in tests)
