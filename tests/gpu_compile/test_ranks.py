"""What a step becomes over two H100s, seen without any: the kernels of one, collectives between."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from jengine.config import EplbConfig
from jengine.runtime.programs import MOVE_EXPERTS
from jengine.sharding.split import Split
from tests.oracles import h100
from tests.oracles.h100 import LLAMA_8B, Program, compile_ranks_step

pytestmark = [h100.needs_compiler, pytest.mark.slow]

SHAPES = json.loads((Path(h100.__file__).parents[2] / "benchmarks" / "shapes.json").read_text())
LLAMA = dict(LLAMA_8B, num_hidden_layers=2)
MOE = dict(SHAPES["qwen3_30b_a3b"], num_hidden_layers=2)


def collectives(program: Program) -> Counter[str]:
    found = re.findall(
        r" (all-reduce|all-gather|all-to-all|reduce-scatter)(?:-start)?\(", program.hlo
    )
    return Counter(found)


def summed(program: Program) -> list[str]:
    """Shapes of what layers sum."""
    return re.findall(r"= (\w+\[[\d,]+\])\S* all-reduce\(", program.hlo)


@pytest.mark.parametrize("rows", [8, 512])
def test_ranks_sum_what_their_products_rounded(rows: int, tmp_path: Path) -> None:
    """Few rows too: else a row would have other bits among many."""
    program = compile_ranks_step(LLAMA, Split(tensor=2), rows, 8, tmp_path)
    assert collectives(program) == {"all-reduce": 5, "all-gather": 1}
    assert summed(program) == [f"bf16[1,{rows},4096]"] * 4
    counts = Counter(program.kernels)
    if rows == 8:
        ours = ("multiply_rows", "rotate_heads", "decode_chunk")
        assert [counts[name] for name in ours] == [9, 2, 2]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (Split(expert=2), {"all-reduce": 5, "all-gather": 1}),
        (Split(data=2), {"all-gather": 2, "reduce-scatter": 2}),  # XLA gathers three arrays at once
    ],
    ids=["experts", "data"],
)
def test_routed_experts_keep_their_kernels(
    split: Split, expected: dict[str, int], tmp_path: Path
) -> None:
    program = compile_ranks_step(MOE, split, 8, 8, tmp_path)
    assert collectives(program) == expected
    counts = Counter(program.kernels)
    for name in ("choose_experts", "plan_experts", "gate_up_of_experts", "down_of_experts"):
        assert counts[name] == 2


def test_tokens_travel_in_rounds(tmp_path: Path) -> None:
    """Three arrays there and one back in each of two layers, and a maximum before it."""
    program = compile_ranks_step(MOE, Split(data=2), 512, 8, tmp_path, exchange="padded_all_to_all")
    assert collectives(program)["all-to-all"] == 8 and collectives(program)["reduce-scatter"] == 0
    counts = Counter(program.kernels)
    assert counts["gate_up_of_experts"] == 2


def test_experts_in_slots(tmp_path: Path) -> None:
    """Counting and choosing slots adds no collective; moving sends two arrays a round."""
    split, eplb = Split(expert=2), EplbConfig(num_redundant_experts=4)
    step = compile_ranks_step(MOE, split, 8, 8, tmp_path / "step", eplb=eplb)
    assert collectives(step) == {"all-reduce": 5, "all-gather": 1}
    assert Counter(step.kernels)["gate_up_of_experts"] == 2
    move = compile_ranks_step(MOE, split, 8, 8, tmp_path / "move", eplb=eplb, name=MOVE_EXPERTS)
    assert collectives(move) == {"all-to-all": 2}
    expert_bytes = 3 * MOE["hidden_size"] * MOE["moe_intermediate_size"] * 2
    # What is sent and received, and the new weights of 66 slots before they are results.
    assert move.temp_bytes < (66 + 2 * 2 + 2) * expert_bytes
