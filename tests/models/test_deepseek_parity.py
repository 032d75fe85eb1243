"""DeepSeek V2 and V3 against Hugging Face transformers in float32: every switch, every way to cut
the text with the same bits, and the experts that each token of each layer goes to.
"""

import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jengine.config import EngineConfig
from jengine.errors import LoadError
from jengine.input_processor import TokensPrompt
from jengine.kv_spec import build_groups
from jengine.layers import moe
from jengine.layers.param import abstract_parameters
from jengine.llm import LLM
from jengine.models.loader import load_parameters, open_model
from jengine.models.registry import resolve_architecture
from jengine.request import SamplingParams
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split
from tests.loading.test_block_scales import write_tensors
from tests.models.cases import by_default
from tests.oracles.tiny_llama import make_tiny_llama

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from tests.models.test_moe_parity import (  # imports both
    CHUNKS,
    TOLERANCE,
    build_driver,
    expected_logits,
    hf_routing,
    permuted,
    tokens,
)

SIZES = dict(
    num_key_value_heads=None, kv_lora_rank=48, qk_nope_head_dim=24, qk_rope_head_dim=16,
    v_head_dim=20, moe_intermediate_size=40, first_k_dense_replace=1,
)  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 8.0, "mscale": 0.707, "mscale_all_dim": 1.4, "rope_theta": 1e4,
    "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 32,
}  # fmt: skip
V2 = dict(
    SIZES, family="DeepseekV2", q_lora_rank=None, n_routed_experts=8, n_shared_experts=2,
    num_experts_per_tok=3, routed_scaling_factor=1.5,
)  # fmt: skip
GROUPS = dict(n_group=4, topk_group=2, topk_method="group_limited_greedy")
V3 = dict(
    SIZES, family="DeepseekV3", q_lora_rank=32, n_routed_experts=12, n_shared_experts=1,
    num_experts_per_tok=3, n_group=4, topk_group=2,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "v2-lite": V2,
    "v2-groups-q-lora": dict(V2, **GROUPS, q_lora_rank=32, first_k_dense_replace=0),
    "v2-yarn-bias": dict(V2, q_lora_rank=32, rope_parameters=YARN, attention_bias=True),
    "v3": V3,
    "v3-yarn": dict(V3, rope_parameters=YARN, tie_word_embeddings=True),
    "v3-no-q-lora": dict(V3, q_lora_rank=None, norm_topk_prob=False),
    "kimi-one-group": dict(V3, n_group=1, topk_group=1, routed_scaling_factor=2.8),
    "v3-halves-rotate": dict(V3, rope_interleave=False, n_shared_experts=3),
}


@pytest.mark.parametrize("name", by_default(CASES, "v2-lite", "v3", "v2-groups-q-lora"))
def test_logits_and_experts_match_transformers(
    name: str, tmp_path: Path, routed: list[tuple[int, np.ndarray]]
) -> None:
    hf_model = make_tiny_llama(tmp_path, **CASES[name])
    driver = build_driver(tmp_path)
    (group,) = driver.runner.groups
    assert group.spec.bytes_per_entry == (48 + 16) * 4
    expected, routing = expected_logits(hf_model), hf_routing(hf_model)
    results, hidden = [], []
    for chunks in CHUNKS:
        routed.clear()
        results.append(driver.logits(tokens(hf_model), chunks))
        assert np.abs(results[-1] - expected).max() <= TOLERANCE, chunks
        hidden.append(driver.hidden)
        jax.effects_barrier()
        for nth, (_, ids) in enumerate(routing.values()):
            steps = [found for number, found in routed if number % len(routing) == nth]
            cut = [found[:size] for found, size in zip(steps, chunks, strict=True)]
            np.testing.assert_array_equal(
                np.sort(np.concatenate(cut), axis=1), np.sort(ids, axis=1)
            )
    assert all(np.array_equal(h, hidden[0]) for h in hidden)
    # The comparison can fail: the same oracle with any one weight permuted is another model.
    changed = [*permuted(hf_model), *permuted_further(hf_model)]
    unseen = [n for n, e in changed if np.abs(results[0] - e).max() <= 10 * TOLERANCE]
    assert not unseen


@torch.no_grad()
def permuted_further(hf_model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """As `permuted`, for the parts that it does not reach: the last rows of attention, which rotate
    or expand values, and the biases of the choice of experts.
    """
    ends = ("q_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight")
    parts = [(n, p, [-2, -1]) for n, p in hf_model.named_parameters() if n.endswith(ends)]
    for name, buffer in hf_model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            order = buffer.argsort()
            parts.append((name, buffer, [int(order[0]), int(order[-1])]))
    assert len(parts) >= 6
    for name, part, rows in parts:
        saved = part[rows].clone()
        part[rows] = saved.flip(0)
        yield f"{name} {rows}", expected_logits(hf_model)
        part[rows] = saved


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, np.ndarray]]:
    """(router's number since the start, expert ids) of every call of a router on the device."""
    seen: list[tuple[int, np.ndarray]] = []
    route, traced = moe.route_grouped, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        ids_Tk, weights_Tk = route(*args, **kwargs)
        number = len(traced)
        traced.append(number)
        jax.debug.callback(lambda ids: seen.append((number, np.asarray(ids))), ids_Tk)
        return ids_Tk, weights_Tk

    monkeypatch.setattr(moe, "route_grouped", recording)
    return seen


@pytest.mark.slow
def test_neighbours_and_prefix_hits_change_no_token(tmp_path: Path) -> None:
    """In bfloat16: four requests together, then each alone, its first page from the cache."""
    make_tiny_llama(tmp_path, **CASES["v3"])
    prompts = [TokensPrompt(prompt_token_ids=[*range(5, 25), 30 + i]) for i in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(
        str(tmp_path), dtype="bfloat16", skip_tokenizer_init=True, num_pages=32, max_num_seqs=4,
        max_num_batched_tokens=32, keep_executables=False,
    ) as llm:  # fmt: skip
        together = llm.generate(prompts, params)
        alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    assert all((output.num_cached_tokens or 0) >= 16 for output in alone)
    found = [[output.outputs[0].token_ids for output in outputs] for outputs in (together, alone)]
    assert found[0] == found[1]
    assert len({tuple(ids) for ids in found[0]}) > 1


def read_config(architecture: str, fields: dict[str, Any], dtype: str = "bfloat16") -> Any:
    _, model_class = resolve_architecture({"architectures": [architecture]})
    return model_class, model_class.config_class.from_hf(
        fields, dtype=dtype, kv_dtype=dtype, max_model_len=64
    )


V2_LITE = dict(
    vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27,
    num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64,
    n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
    first_k_dense_replace=1, max_position_embeddings=163840, topk_method="greedy",
)  # fmt: skip


def test_the_cache_holds_one_latent_a_token() -> None:
    model_class, cfg = read_config("DeepseekV2ForCausalLM", V2_LITE)
    (group,) = build_groups(model_class.kv_specs(cfg), 16)
    assert len(group.layers) == 27
    assert group.bytes_per_page == 16 * 27 * 576 * 2


def test_published_parameter_counts() -> None:
    """15.7 billion of V2-Lite, 671 billion of V3, 1.04 trillion of Kimi K2."""
    assert count("DeepseekV2ForCausalLM", V2_LITE) == pytest.approx(15.7e9, rel=0.005)
    v3 = dict(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
        num_attention_heads=128,
    )  # fmt: skip
    assert count("DeepseekV3ForCausalLM", v3) == pytest.approx(671e9, rel=0.001)
    k2 = dict(
        v3, vocab_size=163840, num_attention_heads=64, n_routed_experts=384, n_group=1,
        topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    assert count("KimiK2ForCausalLM", k2) == pytest.approx(1.04e12, rel=0.015)


def count(architecture: str, fields: dict[str, Any]) -> int:
    model_class, cfg = read_config(architecture, fields)
    return sum(int(np.prod(p.shape)) for p in abstract_parameters(model_class(cfg)).values())


@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3"])
def test_defaults_are_those_of_transformers(family: str) -> None:
    """For fields that an old or a hand-written config.json leaves out."""
    fields = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=6,
                  num_attention_heads=4, num_experts_per_tok=8)  # fmt: skip
    theirs = getattr(transformers, f"{family}Config")(**fields)
    _, cfg = read_config(f"{family}ForCausalLM", fields)
    flat = {**vars(cfg), **vars(cfg.moe), **vars(cfg.mla)}
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
             "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "rms_norm_eps",
             "max_position_embeddings", "tie_word_embeddings", "attention_bias")  # fmt: skip
    assert [flat[name] for name in names] == [getattr(theirs, name) for name in names]
    assert cfg.moe.num_experts == theirs.n_routed_experts
    shared = theirs.n_shared_experts * theirs.moe_intermediate_size
    assert cfg.shared_intermediate_size == shared
    assert cfg.sparse_layers.count(False) == theirs.first_k_dense_replace
    assert cfg.moe.grouped.scale == theirs.routed_scaling_factor
    if family == "DeepseekV3":
        assert (cfg.moe.grouped.num_groups, cfg.moe.grouped.top_groups) == (8, 4)


def test_layers_that_predict_further_tokens_are_ignored() -> None:
    fields = dict(V2_LITE, topk_method="noaux_tc", num_nextn_predict_layers=2)
    model_class, cfg = read_config("DeepseekV3ForCausalLM", fields)
    ignored = model_class.weight_table(cfg, "hf").ignored
    assert {"model.layers.27.*", "model.layers.28.*"} <= {*ignored}
    assert not any(fnmatch.fnmatchcase("model.layers.26.mlp.gate.weight", p) for p in ignored)


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("DeepseekV2ForCausalLM", "norm_topk_prob", True),
        ("DeepseekV2ForCausalLM", "topk_method", "noaux_tc"),
        ("DeepseekV2ForCausalLM", "attention_bias", True),
        ("DeepseekV3ForCausalLM", "scoring_func", "softmax"),
        ("DeepseekV3ForCausalLM", "moe_layer_freq", 2),
    ],
)
def test_what_is_not_supported_is_refused(architecture: str, field: str, value: Any) -> None:
    fields = {**V2_LITE, "topk_method": None, field: value}
    if field != "topk_method":
        del fields["topk_method"]
    with pytest.raises(LoadError, match=field):
        read_config(architecture, fields)


def test_v3_in_fp8_is_dequantised_at_load(tmp_path: Path) -> None:
    """As published: blocks of 128 x 128 with float32 scales, of all linear maps but routers."""
    make_tiny_llama(tmp_path / "exact", **CASES["v3"])
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    packed, rng = dict(exact), np.random.default_rng(0)
    for name, weight in exact.items():
        if not name.endswith("proj.weight") and "kv_a_proj" not in name:
            continue
        scale = rng.uniform(0.01, 0.02, [-(-n // 128) for n in weight.shape]).astype(np.float32)
        per_value = scale.repeat(128, 0).repeat(128, 1)[: len(weight), : weight.shape[1]]
        packed[name] = (weight / per_value).astype(ml_dtypes.float8_e4m3fn)
        packed[name + "_scale_inv"] = scale
        exact[name] = packed[name].astype(np.float32) * per_value
    assert len(packed) > len(exact) + 40
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = json.loads((tmp_path / "exact" / "config.json").read_text())
    for folder, tensors in (("exact", exact), ("packed", packed)):
        write_tensors(tmp_path / folder, tensors)
    config["quantization_config"] = quantization
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    placement = Placement(Split(), (jax.devices()[0],))
    expected, got = (
        load_parameters(
            open_model(EngineConfig.from_kwargs(str(tmp_path / folder), dequantize=True)), placement
        )
        for folder in ("exact", "packed")
    )
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(value), path)
