"""What the steps of Qwen3.5, with states beside pages, become on an H100, seen without one."""

from pathlib import Path

import pytest

from tests.oracles import h100
from tests.oracles.h100 import QWEN35_2B, Program, compile_step

pytestmark = h100.needs_compiler

SEQS = 64
STATE_BYTES = h100.num_bytes(h100.kv_arrays(QWEN35_2B)[0]) // h100.NUM_STATES
LOGITS_BYTES = 4 * SEQS * QWEN35_2B["vocab_size"]
MIB = 1 << 20


def check_is_in_place(program: Program) -> None:
    consumed = h100.num_bytes((h100.kv_arrays(QWEN35_2B), h100.row_state(QWEN35_2B)))
    assert program.alias_bytes == consumed
    needed = [copy.num_bytes for copy in program.copies if not copy.is_optional]
    assert max(needed) < STATE_BYTES  # nobody copies a state, nor all of them


@pytest.mark.parametrize("max_steps", [1, 8])
def test_decode_steps_are_one_graph_in_place(tmp_path: Path, max_steps: int) -> None:
    program = compile_step(QWEN35_2B, SEQS, SEQS, tmp_path, max_steps)
    assert program.top_level == ["kCommandBuffer"]
    check_is_in_place(program)
    # The states of the sequences are gathered before they are written back; the logits, three more
    # of their size while they are sampled, and what is lost between such blocks.
    assert program.temp_bytes <= SEQS * STATE_BYTES + 5 * LOGITS_BYTES + 8 * MIB


def test_a_prefill_step_is_in_place(tmp_path: Path) -> None:
    program = compile_step(QWEN35_2B, 2048, 8, tmp_path)
    check_is_in_place(program)
    assert program.temp_bytes <= 160 * MIB
