"""What the steps of DeepSeek-V4 become on an H100, seen without one."""

from pathlib import Path

import pytest

from tests.models.test_deepseek_v4_checkpoint import FLASH
from tests.oracles import h100
from tests.oracles.h100 import compile_step

pytestmark = [h100.needs_compiler, pytest.mark.slow]

# A layer of each kind, with few experts.
CONFIG = FLASH | {
    "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "n_routed_experts": 16,
    "num_hash_layers": 1,
}  # fmt: skip
MIB = 1 << 20
# Of a layer with a window only, one that selects entries, one that reads all; two blocks each.
OURS = {
    "project_streams": 6, "mix_streams": 6, "norm_rows": 3, "attend_token": 3, "add_up_splits": 3,
    "compress_pieces": 2, "score_queries": 1, "choose_of_chunks": 1, "choose_experts": 2,
    "gate_up_of_experts": 3, "down_of_experts": 3,
}  # fmt: skip


def test_a_decode_step_is_one_graph_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(h100, "NUM_PAGES", 256)
    program = compile_step(CONFIG, 64, 64, tmp_path)
    assert program.top_level == ["kCommandBuffer"]
    consumed = h100.num_bytes((h100.kv_arrays(CONFIG), h100.row_state(CONFIG)))
    assert program.alias_bytes == consumed
    # Nobody copies a cache: the smallest, of entries of 128 tokens, has 0.25 MiB.
    assert max(copy.num_bytes for copy in program.copies if not copy.is_optional) < 0.25 * MIB
    # Nor weights, to multiply several at once.
    assert not [name for name in program.kernels if name.startswith("wrapped_concatenate")]
    for kernel, number in OURS.items():
        assert program.kernels.count(kernel) == number, kernel
    assert len(program.kernels) <= 140


def test_a_chunk_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h100, "NUM_PAGES", 256)
    program = compile_step(CONFIG, 2048, 8, tmp_path)
    consumed = h100.num_bytes((h100.kv_arrays(CONFIG), h100.row_state(CONFIG)))
    assert program.alias_bytes == consumed
    assert "kWhile" not in program.top_level  # loops of the host
    for kernel, number in OURS.items():
        expected = 0 if kernel == "add_up_splits" else number
        assert program.kernels.count(kernel) == expected, kernel
