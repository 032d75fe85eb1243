"""What rests on private JAX names."""

import subprocess
import sys
from pathlib import Path

import pytest

from jengine.jax_compat import NVIDIA_DEVICES
from tests.oracles import h100


@pytest.mark.skipif(h100.missing() is not None, reason="the CUDA plugin is not installed")
@pytest.mark.skipif(any(Path(p).exists() for p in NVIDIA_DEVICES), reason="there is a GPU")
def test_the_cuda_plugin_is_quiet_without_a_gpu() -> None:
    code = "import jax; {}print(jax.devices()[0].platform)"
    quiet = "from jengine.jax_compat import quiet_without_gpu as q; q(); "
    loud, silent = (
        subprocess.run(
            [sys.executable, "-c", code.format(call)], capture_output=True, text=True, check=True,
            env={},
        )
        for call in ("", quiet)
    )  # fmt: skip
    assert loud.stdout == silent.stdout == "cpu\n"
    assert "Traceback" in loud.stderr and silent.stderr == ""
