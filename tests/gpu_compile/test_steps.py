"""What the steps of Llama-3.1-8B, Qwen3-0.6B, Qwen3-30B-A3B, DeepSeek-V2-Lite and a layer of
DeepSeek-V3.2 become on an H100, seen without one.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.oracles import h100
from tests.oracles.h100 import LLAMA_8B, QWEN3_600M, Program, compile_step

pytestmark = h100.needs_compiler

SPARSE = {  # a layer of DeepSeek-V3.2, but for few experts and a small vocabulary
    "architectures": ["DeepseekV32ForCausalLM"], "hidden_size": 2048, "intermediate_size": 2048,
    "vocab_size": 8192, "num_attention_heads": 128, "n_routed_experts": 16, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 256, "first_k_dense_replace": 0,
}  # fmt: skip
SHAPES = json.loads((Path(h100.__file__).parents[2] / "benchmarks" / "shapes.json").read_text())
FAMILIES = {
    "llama": LLAMA_8B,
    "qwen3": QWEN3_600M,
    "qwen3-moe": SHAPES["qwen3_30b_a3b"],
    "deepseek-v2": SHAPES["deepseek_v2_lite"],
}
SEQS = 64
STEPS = 8
# Norm, q k v, rotation and write, attention and the sum of its splits, o, norm, gate and up, down;
# routed experts have router, choice and order before their two products. Latent attention has the
# products that absorb, norm and rotation of its own, and shared experts whose summands are joined.
KERNELS_OF_A_LAYER = {"llama": 9, "qwen3": 9, "qwen3-moe": 12, "deepseek-v2": 20}
METADATA_BYTES = 64 << 10  # what one int32 array brings, cut into fields
MIB = 1 << 20
# XLA's own matrix products, and our kernels: Triton's (through its PTX call) and Mosaic's.
CUSTOM_CALLS = {"__gpu$xla.gpu.ptx", "mosaic_gpu_v2", "__cublas$gemm", "__cublas$lt$matmul"}


@dataclasses.dataclass(frozen=True)
class Step:
    config: dict[str, Any]
    num_seqs: int
    program: Program

    @property
    def consumed_bytes(self) -> int:
        """What the step replaces: all pages, and the state of rows."""
        return h100.num_bytes((h100.kv_arrays(self.config), h100.row_state(self.config)))

    @property
    def page_array_bytes(self) -> int:
        return h100.num_bytes(h100.kv_arrays(self.config)[0])

    @property
    def logits_bytes(self) -> int:
        return 4 * self.num_seqs * self.config["vocab_size"]


def compiled(
    folder: Path, family: str, layers: int, tokens: int, seqs: int, max_steps: int = 1, **options
) -> Step:
    base = SPARSE if family == "sparse" else FAMILIES[family]
    config = {**base, "num_hidden_layers": layers}
    return Step(config, seqs, compile_step(config, tokens, seqs, folder, max_steps, **options))


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=pytest.mark.slow) if f == "qwen3" else f for f in FAMILIES],
)
def decode(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Step:
    return compiled(tmp_path_factory.mktemp("decode"), request.param, 2, SEQS, SEQS)


@pytest.fixture(scope="module")
def multi_step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    return compiled(tmp_path_factory.mktemp("multi_step"), "llama", 2, SEQS, SEQS, STEPS)


@pytest.fixture(scope="module")
def prefill(tmp_path_factory: pytest.TempPathFactory) -> Step:
    return compiled(tmp_path_factory.mktemp("prefill"), "llama", 2, 2048, 8)


def check_is_one_graph(step: Step) -> None:
    assert step.program.top_level == ["kCommandBuffer"]


def check_updates_in_place(step: Step) -> None:
    assert step.program.alias_bytes == step.consumed_bytes


def check_copies(step: Step) -> None:
    """Fields of the metadata, always. The sampler may copy the logits once where it is asked for
    more than greedy tokens."""
    copies = step.program.copies
    assert sum(c.num_bytes for c in copies if not c.is_optional) <= METADATA_BYTES, copies
    assert sum(c.num_bytes for c in copies) <= METADATA_BYTES + step.logits_bytes, copies
    assert step.page_array_bytes > METADATA_BYTES  # so none of them is a copy of pages


def check_sorts_nothing(step: Step) -> None:
    hlo = step.program.hlo
    assert not re.search(r"\b(sort|topk)\(", hlo)
    assert set(re.findall(r'custom_call_target="([^"]+)"', hlo)) <= CUSTOM_CALLS


def test_a_decode_step_is_one_graph(decode: Step) -> None:
    check_is_one_graph(decode)


def test_a_decode_step_updates_pages_and_rows_in_place(decode: Step) -> None:
    check_updates_in_place(decode)


def test_a_decode_step_copies_metadata_only(decode: Step) -> None:
    check_copies(decode)


def test_a_decode_step_sorts_nothing(decode: Step) -> None:
    check_sorts_nothing(decode)


def test_a_decode_step_needs_little_memory(decode: Step) -> None:
    """Logits, noise, and two more of their size: nothing else grows with the vocabulary."""
    assert decode.program.temp_bytes <= 4 * decode.logits_bytes + 8 * MIB


def test_many_sequences_are_sampled_in_blocks(tmp_path: Path) -> None:
    """In the same graph; only the logits are there for all sequences at once."""
    step = compiled(tmp_path, "qwen3", 1, 4 * SEQS, 4 * SEQS)
    check_is_one_graph(step)
    assert step.program.temp_bytes <= 2 * step.logits_bytes + 8 * MIB


def test_several_decode_steps_are_one_graph(multi_step: Step) -> None:
    check_is_one_graph(multi_step)
    loops = [t for t in multi_step.program.thunks if t.kind == "kWhile" and not t.is_optional]
    assert [loop.ancestors for loop in loops] == [("kCommandBuffer",)]
    inside = [t for t in multi_step.program.thunks if "kWhile" in t.ancestors]
    assert sum(t.name == "decode_chunk" for t in inside) == 2  # one for each layer


def test_several_decode_steps_copy_and_sort_nothing(multi_step: Step) -> None:
    check_updates_in_place(multi_step)
    check_copies(multi_step)
    check_sorts_nothing(multi_step)


def test_a_short_prefill_step_is_one_graph(tmp_path: Path) -> None:
    check_is_one_graph(compiled(tmp_path, "llama", 2, 128, 8))


def test_a_long_prefill_step_is_launched_kernel_by_kernel(prefill: Step) -> None:
    """See `bucket_options`."""
    assert "kCommandBuffer" not in prefill.program.top_level
    check_sorts_nothing(prefill)


def test_a_prefill_step_copies_no_pages(prefill: Step) -> None:
    check_updates_in_place(prefill)
    check_copies(prefill)


def test_a_prefill_step_needs_little_memory(prefill: Step) -> None:
    """Activations of one layer. Logits of all tokens alone would be 1,002 MiB."""
    gate_up = 2 * 2048 * 2 * LLAMA_8B["intermediate_size"]
    assert prefill.program.temp_bytes <= 2 * gate_up


@pytest.mark.parametrize(
    ("family", "seqs"),
    [
        pytest.param("llama", 1, marks=pytest.mark.slow),
        ("llama", SEQS),
        pytest.param("qwen3", SEQS, marks=pytest.mark.slow),
        ("qwen3-moe", SEQS),
        ("deepseek-v2", SEQS),
    ],
)
def test_kernels_of_a_layer(family: str, seqs: int, tmp_path: Path) -> None:
    """With cuBLAS for products, also of one row: untuned, XLA's own ones are split and added up in
    further kernels."""
    two, four = (
        compiled(
            tmp_path / str(layers), family, layers, seqs, seqs, xla_gpu_enable_triton_gemm=False
        ).program.kernels
        for layers in (2, 4)
    )
    assert (len(four) - len(two)) / 2 <= KERNELS_OF_A_LAYER[family], "\n".join(four)


@pytest.mark.slow
def test_tokens_are_selected_without_a_sort(tmp_path: Path) -> None:
    """Loops whose length is data, still in one graph."""
    step = compiled(tmp_path, "sparse", 1, SEQS, SEQS)
    check_is_one_graph(step)
    check_updates_in_place(step)
    check_sorts_nothing(step)


@pytest.mark.slow
def test_all_layers_are_one_graph(tmp_path: Path) -> None:
    step = compiled(tmp_path, "llama", LLAMA_8B["num_hidden_layers"], SEQS, SEQS)
    check_is_one_graph(step)
    check_updates_in_place(step)
    check_copies(step)
