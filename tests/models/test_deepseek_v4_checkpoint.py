"""Configs and checkpoints of DeepSeek-V4 as they are published."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jengine.config import CacheConfig, EngineConfig
from jengine.errors import LoadError
from jengine.kv_spec import KVGroup, build_groups
from jengine.layers.param import ParamInfo, abstract_parameters
from jengine.loading.block_scales import BlockScaledSource, PackedSource
from jengine.loading.rules import plan_fills
from jengine.models.deepseek_v4.config import Compression, DeepseekV4Config
from jengine.models.deepseek_v4.model import DeepseekV4ForCausalLM
from jengine.models.deepseek_v4.mtp import DeepseekV4MTPForCausalLM
from jengine.models.loader import load_parameters, open_model
from jengine.models.registry import resolve_architecture
from jengine.pallas_kernels.packed import FP8_BLOCKS, FP8_FLOAT_BLOCKS, MXFP4
from jengine.runtime.memory import plan_pages
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split
from tests.oracles.deepseek_v4 import GOLDEN

COMMON = dict(
    architectures=["DeepseekV4ForCausalLM"], model_type="deepseek_v4", vocab_size=129280,
    num_nextn_predict_layers=1, num_key_value_heads=1, head_dim=512, qk_rope_head_dim=64,
    o_lora_rank=1024, sliding_window=128, compress_rope_theta=160000, rope_theta=10000,
    rope_scaling=dict(type="yarn", factor=16, original_max_position_embeddings=65536, beta_fast=32,
                      beta_slow=1),
    max_position_embeddings=1048576, index_n_heads=64, index_head_dim=128, num_experts_per_tok=6,
    n_shared_experts=1, scoring_func="sqrtsoftplus", topk_method="noaux_tc", norm_topk_prob=True,
    num_hash_layers=3, swiglu_limit=10.0, hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6,
    rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False, attention_dropout=0.0,
    tie_word_embeddings=False, torch_dtype="bfloat16", expert_dtype="fp4",
    quantization_config=dict(quant_method="fp8", fmt="e4m3", scale_fmt="ue8m0",
                             activation_scheme="dynamic", weight_block_size=[128, 128]),
)  # fmt: skip
FLASH = dict(
    COMMON, hidden_size=4096, num_hidden_layers=43, num_attention_heads=64, q_lora_rank=1024,
    o_groups=8, compress_ratios=[0, 0] + [4, 128] * 20 + [4] + [0], index_topk=512,
    n_routed_experts=256, moe_intermediate_size=2048, routed_scaling_factor=1.5,
)  # fmt: skip
PRO = dict(
    COMMON, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536,
    o_groups=16, compress_ratios=[128, 128] + [4, 128] * 29 + [4] + [0], index_topk=1024,
    n_routed_experts=384, moe_intermediate_size=3072, routed_scaling_factor=2.5,
)  # fmt: skip
LAYER_TYPES = {0: "sliding_attention", 4: "compressed_sparse_attention",
               128: "heavily_compressed_attention"}  # fmt: skip


def read(fields: Mapping[str, Any]) -> DeepseekV4Config:
    model_class = resolve_architecture(dict(fields))[1]
    return model_class.config_class.from_hf(
        fields, dtype="bfloat16", kv_dtype="bfloat16", max_model_len=1 << 20
    )


def unquantised(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As of a checkpoint that was never quantised, which `dequantize` makes of one that was."""
    return {name: value for name, value in fields.items() if name != "quantization_config"}


def as_transformers_writes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The other dialect, which leaves most published fields out."""
    layers = fields["num_hidden_layers"]
    gone = ("compress_ratios", "num_hash_layers", "rope_theta", "compress_rope_theta",
            "rope_scaling", "topk_method", "quantization_config", "expert_dtype")  # fmt: skip
    return {
        **{name: value for name, value in fields.items() if name not in gone},
        "layer_types": [LAYER_TYPES[r] for r in fields["compress_ratios"][:layers]],
        "compress_rates": {LAYER_TYPES[4]: 4, LAYER_TYPES[128]: 128},
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * (layers - 3),
        "partial_rotary_factor": 0.125,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.125},
            "compress": {
                **fields["rope_scaling"], "rope_type": "yarn", "rope_theta": 160000,
                "partial_rotary_factor": 0.125, "attention_factor": 1.0,
            },
        },
    }  # fmt: skip


def published_tensors(f: Mapping[str, Any]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(name, bytes of an element, shape) of every tensor."""
    D, H, N, V = f["hidden_size"], f["head_dim"], f["num_attention_heads"], f["vocab_size"]
    rank, R, E, F = (
        f[n] for n in ("q_lora_rank", "o_lora_rank", "n_routed_experts", "moe_intermediate_size")
    )
    G, J, X = f["o_groups"], f["index_n_heads"], f["index_head_dim"]

    def fp8(name: str, rows: int, columns: int) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        yield name + ".weight", 1, (rows, columns)
        yield name + ".scale", 1, (-(-rows // 128), -(-columns // 128))

    def fp4(name: str, rows: int, columns: int) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        yield name + ".weight", 1, (rows, columns // 2)
        yield name + ".scale", 1, (rows, columns // 32)

    def hyper_head(prefix: str) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        yield prefix + "hc_head_fn", 4, (4, 4 * D)
        yield prefix + "hc_head_base", 4, (4,)
        yield prefix + "hc_head_scale", 4, (1,)

    def compressor(
        p: str, dim: int, ratio: int, halves: int
    ) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        yield p + "ape", 4, (ratio, halves * dim)
        yield p + "wkv.weight", 2, (halves * dim, D)
        yield p + "wgate.weight", 2, (halves * dim, D)
        yield p + "norm.weight", 2, (dim,)

    yield "embed.weight", 2, (V, D)
    yield "head.weight", 2, (V, D)
    yield "norm.weight", 2, (D,)
    yield from hyper_head("")
    layers = f["num_hidden_layers"]
    for i, ratio in enumerate(f["compress_ratios"]):
        p = f"layers.{i}." if i < layers else f"mtp.{i - layers}."
        for block in ("attn", "ffn"):
            yield f"{p}{block}_norm.weight", 2, (D,)
            yield f"{p}hc_{block}_fn", 4, (24, 4 * D)
            yield f"{p}hc_{block}_base", 4, (24,)
            yield f"{p}hc_{block}_scale", 4, (3,)
        yield p + "attn.attn_sink", 4, (N,)
        yield p + "attn.q_norm.weight", 2, (rank,)
        yield p + "attn.kv_norm.weight", 2, (H,)
        yield from fp8(p + "attn.wq_a", rank, D)
        yield from fp8(p + "attn.wq_b", N * H, rank)
        yield from fp8(p + "attn.wkv", H, D)
        yield from fp8(p + "attn.wo_a", G * R, N * H // G)
        yield from fp8(p + "attn.wo_b", D, G * R)
        yield p + "ffn.gate.weight", 2, (E, D)
        if i < f["num_hash_layers"]:
            yield p + "ffn.gate.tid2eid", 8, (V, f["num_experts_per_tok"])
        else:
            yield p + "ffn.gate.bias", 4, (E,)
        for e in range(E):
            yield from fp4(f"{p}ffn.experts.{e}.w1", F, D)
            yield from fp4(f"{p}ffn.experts.{e}.w3", F, D)
            yield from fp4(f"{p}ffn.experts.{e}.w2", D, F)
        yield from fp8(p + "ffn.shared_experts.w1", F, D)
        yield from fp8(p + "ffn.shared_experts.w3", F, D)
        yield from fp8(p + "ffn.shared_experts.w2", D, F)
        if ratio:
            yield from compressor(p + "attn.compressor.", H, ratio, 2 if ratio == 4 else 1)
        if ratio == 4:
            yield from fp8(p + "attn.indexer.wq_b", J * X, rank)
            yield p + "attn.indexer.weights_proj.weight", 2, (J, D)
            yield from compressor(p + "attn.indexer.compressor.", X, ratio, 2)
        if i >= layers:
            yield from fp8(p + "e_proj", D, D)
            yield from fp8(p + "h_proj", D, D)
            yield from ((f"{p}{name}.weight", 2, (D,)) for name in ("enorm", "hnorm", "norm"))
            yield from hyper_head(p)


class NamesOnly:
    """A source that knows names and shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> np.ndarray:
        raise AssertionError("planning reads nothing")


CODES_PER_BYTE = {"e2m1": 2, "scales of e2m1": 0, "scales of e4m3": 0}


def num_weights(parameters: Iterable[ParamInfo]) -> int:
    return sum(CODES_PER_BYTE.get(p.init, 1) * int(np.prod(p.shape)) for p in parameters)


@pytest.mark.parametrize("is_packed", [True, False])
def test_every_tensor_of_flash_fills_its_rows(is_packed: bool) -> None:
    """All 69,187 of them, 148.65 GiB; with the draft block and without."""
    tensors = list(published_tensors(FLASH))
    shapes = {name: shape for name, _, shape in tensors}
    assert len(shapes) == len(tensors) == 69187
    assert sum(size * int(np.prod(s)) for _, size, s in tensors) == 159_609_485_896
    cfg = read(FLASH if is_packed else unquantised(FLASH))

    def opened(shapes: dict[str, tuple[int, ...]]) -> PackedSource | BlockScaledSource:
        if is_packed:
            return PackedSource(NamesOnly(shapes), has_exponents=True)
        return BlockScaledSource(NamesOnly(shapes))

    source = opened(shapes)
    for model_class, billions in (
        (DeepseekV4MTPForCausalLM, 290.94),
        (DeepseekV4ForCausalLM, 284.33),
    ):
        abstract = abstract_parameters(model_class(cfg))
        plan = plan_fills(source, model_class.weight_table(cfg, "hf"), abstract)
        assert all(plan.values())
        assert num_weights(abstract.values()) == pytest.approx(billions * 1e9, rel=1e-4)
        num_bytes = sum(p.num_bytes for p in abstract.values())
        if is_packed and model_class is DeepseekV4MTPForCausalLM:
            # Tables are int32; each row of FP8 has its block's scale.
            assert num_bytes == pytest.approx(159_609_485_896, rel=1e-3)
        elif is_packed:
            assert num_bytes == pytest.approx(156.1e9, rel=1e-3)
        used = {fill.source for fills in plan.values() for fill in fills}
        unused = {*source.names()} - used
        is_plain = model_class is DeepseekV4ForCausalLM
        assert unused == {n for n in source.names() if n.startswith("mtp.") and is_plain}
    for missing in ("layers.7.ffn.experts.200.w3", "layers.5.attn.compressor.ape"):
        fewer = opened({n: s for n, s in shapes.items() if not n.startswith(missing)})
        with pytest.raises(LoadError, match=missing):
            plan_fills(fewer, DeepseekV4ForCausalLM.weight_table(cfg, "hf"), abstract)


def test_pro_has_its_published_size() -> None:
    tensors = list(published_tensors(PRO))
    assert len(tensors) == 145_116
    assert sum(size * int(np.prod(s)) for _, size, s in tensors) == pytest.approx(
        864.705e9, rel=1e-5
    )
    parameters = abstract_parameters(DeepseekV4ForCausalLM(read(PRO))).values()
    assert num_weights(parameters) == pytest.approx(1573.0e9, rel=1e-4)


@pytest.mark.parametrize("fields", [FLASH, PRO], ids=["flash", "pro"])
def test_both_dialects_say_the_same(fields: dict[str, Any]) -> None:
    cfg = read(fields)
    assert read(as_transformers_writes(fields)) == read(unquantised(fields))
    assert (cfg.packing, cfg.moe.packing) == (FP8_BLOCKS, MXFP4)
    base = read({**fields, "expert_dtype": "fp8", "quantization_config": {"quant_method": "fp8"}})
    assert base.packing == base.moe.packing == FP8_FLOAT_BLOCKS
    counts = [
        cfg.compressions.count(c) for c in (None, Compression(4, True), Compression(128, False))
    ]
    assert counts == ([2, 21, 20] if fields is FLASH else [0, 30, 31])
    assert (cfg.num_hash_layers, cfg.num_nextn_predict_layers, cfg.index.top_k) == (
        3, 1, fields["index_topk"],
    )  # fmt: skip
    # Fast rotations are kept, slow ones are 16 times slower; none is scaled.
    rope = np.array(cfg.compress_rope.inv_freq)
    plain = 160000.0 ** -(np.arange(32) / 32)
    np.testing.assert_allclose(rope[:16], plain[:16], rtol=1e-6)
    np.testing.assert_allclose(rope[25:], plain[25:] / 16, rtol=1e-6)
    assert cfg.compress_rope.scaling == cfg.rope.scaling == 1.0
    np.testing.assert_allclose(cfg.rope.inv_freq, 10000.0 ** -(np.arange(32) / 32), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dspark_block_size=5), "dspark_block_size.*DSpark drafters are not supported"),
        (dict(compress_ratios=[0] * 43 + [4]), "compress_ratios"),
        (dict(compress_ratios=[0] * 40), "compress_ratios"),
        (dict(scoring_func="sigmoid"), "scoring_func"),
        (dict(num_key_value_heads=8), "num_key_value_heads"),
        (dict(o_groups=7), "o_groups"),
        (dict(q_lora_rank=None), "q_lora_rank"),
        (dict(quantization_config=dict(moe_quant_algo="NVFP4")), "NVFP4"),
        (dict(quantization_config=dict(weight_block_size=[1, 32])), "block_size"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        read({**FLASH, **change})


MIB, GIB = 1 << 20, 1 << 30


def request_bytes(groups: tuple[KVGroup, ...], num_tokens: int) -> dict[str, int]:
    """What a request of so many tokens holds, by kind of group."""
    held: dict[str, int] = {}
    for group in groups:
        kind = f"{group.spec.kind}-{group.spec.tokens_per_entry}"
        pages = group.max_pages(num_tokens, max_chunk=1)
        held[kind] = held.get(kind, 0) + pages * group.bytes_per_page
    return held


def test_a_million_tokens_of_pro_take_a_ninth_of_v32s() -> None:
    """9.62 GiB against 83.9, as published: windows counted by their tokens, states apart."""
    cfg, million = read(PRO), 1 << 20
    groups = build_groups(DeepseekV4ForCausalLM.kv_specs(cfg))
    assert {group.page_size for group in groups} == {128}
    held = request_bytes(groups, million)
    assert held["mla-4"] == 30 * (million // 4) * (1024 + 256)
    assert held["mla-128"] == 31 * (million // 128) * 1024
    window = 61 * 128 * 1024
    assert held["sliding_window-1"] == 2 * window  # a window touches two pages of its size
    published = held["mla-4"] + held["mla-128"] + window
    assert round(published / GIB, 2) == 9.62
    assert held["state-1"] == 2 * 861 * 1024  # two, while it passes a page's end
    # With the second page of windows and two states a request takes a thousandth more.
    assert sum(held.values()) < 1.002 * published
    # Per layer, windows included: 320.1 MiB and 8.1 MiB, as published.
    assert round((held["mla-4"] / 30 + window / 61) / MIB, 1) == 320.1
    assert round((held["mla-128"] / 31 + window / 61) / MIB, 1) == 8.1
    v32_class = resolve_architecture({"architectures": ["DeepseekV32ForCausalLM"]})[1]
    v32 = v32_class.config_class.from_hf(
        dict(vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
             num_attention_heads=128, max_position_embeddings=million),
        dtype="bfloat16", kv_dtype="bfloat16", max_model_len=million,
    )  # fmt: skip
    (v32_bytes,) = request_bytes(build_groups(v32_class.kv_specs(v32)), million).values()
    assert round(v32_bytes / GIB, 1) == 83.9
    assert round(v32_bytes / published, 1) == 8.7


def test_the_planner_asks_for_no_more_than_that() -> None:
    """One such request, its steps of one token: the null pages, the second page of windows and two
    states are what the plan has beyond the published figure."""
    groups = build_groups(DeepseekV4ForCausalLM.kv_specs(read(PRO)))
    published = 10_334_371_840  # 9.6246 GiB
    null_pages = sum(group.bytes_per_page for group in groups)
    needed = published + 61 * 128 * 1024 + 2 * 861 * 1024 + null_pages

    def plan(num_bytes: int) -> tuple[int, ...]:
        return plan_pages(
            groups, CacheConfig(kv_cache_memory_bytes=num_bytes), free_bytes=0, is_planned=True,
            max_model_len=1 << 20, max_chunk=1, max_num_seqs=1,
        )  # fmt: skip

    assert plan(needed)[:3] == (8193, 8193, 3)
    with pytest.raises(ValueError, match=f"one request of max_model_len=1048576 needs {needed:,}"):
        plan(needed - 1)
    assert needed / GIB < 9.65


def test_growth_and_states_are_the_papers() -> None:
    """Bytes a token in bfloat16, and the states of unfinished groups."""
    for fields, growth, state_kib in ((PRO, 9848.0, 861.0), (FLASH, 6880.0, 592.5)):
        groups = build_groups(DeepseekV4ForCausalLM.kv_specs(read(fields)))
        entries = [group for group in groups if group.spec.tokens_per_entry > 1]
        assert sum(group.bytes_per_page for group in entries) / 128 == growth
        states = [group for group in groups if group.spec.is_state]
        assert sum(group.bytes_per_page for group in states) / 1024 == state_kib


def test_the_draft_model_has_one_window_more() -> None:
    cfg = read(FLASH)
    plain, draft = (c.kv_specs(cfg) for c in (DeepseekV4ForCausalLM, DeepseekV4MTPForCausalLM))
    assert draft[:-1] == plain
    assert len(build_groups(draft)) == len(build_groups(plain))


def test_a_table_of_experts_is_checked(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(GOLDEN / "tinyA" / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "tinyA" / "config.json").read_text())
    placement = Placement(Split(), (jax.devices()[0],))
    for value, message in (
        (8, r"outside of 0\.\.7"),
        (tensors["layers.0.ffn.gate.tid2eid"][5, 1], "twice"),
    ):
        table = tensors["layers.0.ffn.gate.tid2eid"].copy()
        table[5, 0] = value
        save_file({**tensors, "layers.0.ffn.gate.tid2eid": table}, tmp_path / "model.safetensors")
        with pytest.raises(LoadError, match=message):
            load_parameters(open_model(EngineConfig.from_kwargs(str(tmp_path))), placement)
