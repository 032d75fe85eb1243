"""A step over a KV cache that fills the card is the step over a small one.

XLA counts a donated array as argument and as result. Where the two exceed the memory, it would
compute things again to save some.
"""

from pathlib import Path

import pytest

from jengine.runtime.xla_options import compiler_options
from tests.oracles import h100
from tests.oracles.h100 import LLAMA_8B, compile_step

pytestmark = h100.needs_compiler

CONFIG = LLAMA_8B | {"num_hidden_layers": 2}
FULL = 1 << 20  # pages of 2 layers: 64 GiB


@pytest.mark.slow
def test_a_full_cache_adds_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = compile_step(CONFIG, 8, 8, tmp_path / "few")
    monkeypatch.setattr(h100, "NUM_PAGES", FULL)
    many = compile_step(CONFIG, 8, 8, tmp_path / "many")
    assert len(many.kernels) == len(few.kernels)
    assert len(many.copies) == len(few.copies)
    # It is the option that does it.
    options = {k: v for k, v in compiler_options("cuda").items() if k != "xla_disable_hlo_passes"}
    monkeypatch.setattr(h100, "compiler_options", lambda platform: options)
    worse = compile_step(CONFIG, 8, 8, tmp_path / "worse")
    assert len(worse.kernels) > len(few.kernels)
