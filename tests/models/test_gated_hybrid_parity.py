"""Qwen3-Next and Qwen3.5 against Hugging Face transformers in float32: every switch, every way to
cut a text that is longer than a chunk, and the experts that each token of each layer goes to.

`python -m tests.models.test_gated_hybrid_parity` prints the parity figures of docs/models.md.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.models.cases import by_default
from tests.oracles.driver import Driver
from tests.oracles.tiny_llama import make_tiny_llama

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from tests.models.test_families import check_bfloat16
from tests.models.test_moe_parity import (  # imports both
    TOLERANCE,
    build_driver,
    check_experts,
    expected_logits,
    hf_routing,
    permuted,
    tokens,
)

LENGTH = 150
CHUNKS = ([LENGTH], [64, 86], [7, 1, 16, 65, 1, 60], [1] * LENGTH)
SIZES = dict(
    head_dim=16, linear_key_head_dim=16, linear_value_head_dim=12, linear_num_key_heads=2,
    linear_num_value_heads=4,
    # What a head reads may nearly cancel, and its norm then blows up roundings: with eps 1e-5 and
    # key heads of 8, transformers itself is 4.5e-4 from the same model in float64, we are 2.6e-4.
    rms_norm_eps=1e-2,
)  # fmt: skip
EXPERTS = dict(
    num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
)  # fmt: skip
NEXT = dict(SIZES, **EXPERTS, family="Qwen3Next", num_hidden_layers=4)
DENSE = dict(SIZES, family="Qwen3_5", num_hidden_layers=4)
LINEAR, FULL = "linear_attention", "full_attention"
CASES: dict[str, dict[str, Any]] = {
    "qwen3-next": NEXT,
    "qwen3-next-some-layers-dense": dict(
        NEXT, norm_topk_prob=False, mlp_only_layers=[0], layer_types=[LINEAR, FULL, LINEAR, FULL]
    ),
    "qwen3-next-bias-tied": dict(
        NEXT, attention_bias=True, tie_word_embeddings=True, num_hidden_layers=2,
        layer_types=[FULL, LINEAR], linear_num_value_heads=2, linear_conv_kernel_dim=3,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5,
        },
    ),
    "qwen3.5": DENSE,
    "qwen3.5-many-value-heads": dict(
        DENSE, num_hidden_layers=2, layer_types=[LINEAR, FULL], linear_num_key_heads=1,
        linear_num_value_heads=6, tie_word_embeddings=True, linear_conv_kernel_dim=2,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.75,
            "mrope_section": [2, 2, 2], "mrope_interleaved": True,
        },
    ),
    "qwen3.5-moe": dict(SIZES, **EXPERTS, family="Qwen3_5Moe", num_hidden_layers=4),
}  # fmt: skip


@pytest.mark.parametrize("name", by_default(CASES, "qwen3-next", "qwen3.5", "qwen3.5-moe"))
def test_logits_and_experts_match_transformers(
    name: str, tmp_path: Path, routed: list[tuple[int, np.ndarray]]
) -> None:
    hf_model = make_tiny_llama(tmp_path, **CASES[name])
    driver = build_driver(tmp_path, LENGTH)
    assert [group.spec.is_state for group in driver.runner.groups] == [False, True]
    expected, routing = expected_logits(hf_model, LENGTH), hf_routing(hf_model, LENGTH)
    results = []
    for chunks in CHUNKS:
        routed.clear()
        results.append(driver.logits(tokens(hf_model, LENGTH), chunks))
        own = np.stack(driver.step_logits) - expected[np.cumsum(chunks) - 1]
        assert np.abs(results[-1] - expected).max() <= TOLERANCE, chunks
        assert np.abs(own).max() <= TOLERANCE, chunks
        jax.effects_barrier()
        check_experts(routed, chunks, routing)
    hidden_TD = driver.runner.hidden_states(tokens(hf_model, LENGTH))  # outside the cache
    logits_TV = np.asarray(hidden_TD, np.float64) @ np.asarray(driver.runner.model.head).T
    assert np.abs(logits_TV - expected).max() <= TOLERANCE
    # The comparison can fail: the same oracle with any one weight permuted is another model.
    changed = [*permuted(hf_model, LENGTH), *permuted_further(hf_model)]
    unseen = [n for n, e in changed if np.abs(results[0] - e).max() <= 10 * TOLERANCE]
    assert not unseen
    check_bfloat16(driver.loaded.checkpoint.hf_config)


@pytest.mark.slow  # 5 to 10 s each
@pytest.mark.parametrize("name", ["qwen3-next", "qwen3.5"])  # experts and none
def test_bits_do_not_depend_on_the_bucket(name: str, tmp_path: Path) -> None:
    """The same cuts in steps of other shapes, a lone decode among them."""
    hf_model = make_tiny_llama(tmp_path, **CASES[name])
    cuts = [40, 33, 1, 1, 1, 30] + [1] * 10
    hidden = []
    for tokens_bucket, seqs in ((40, 1), (64, 3), (151, 8)):
        driver = Driver(
            tmp_path, max_model_len=128, num_pages=32, max_num_seqs=seqs,
            prefill_buckets=(tokens_bucket,), decode_buckets=(seqs,),
            max_num_batched_tokens=tokens_bucket,
        )  # fmt: skip
        driver.logits(tokens(hf_model, sum(cuts)), cuts)
        hidden.append(driver.hidden)
    assert all(np.array_equal(h, hidden[0]) for h in hidden)


@torch.no_grad()
def permuted_further(hf_model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """As `permuted`, for what lies behind the first rows: other kinds and heads, taps."""
    cfg = hf_model.config
    H, keys = cfg.linear_key_head_dim, cfg.linear_key_head_dim * cfg.linear_num_key_heads
    share = cfg.linear_num_value_heads // cfg.linear_num_key_heads
    values = share * cfg.linear_value_head_dim
    by_head = [H, 2 * H, 2 * H + values, -values, -1 - values]
    starts = {
        "q_proj.weight": [cfg.head_dim, 2 * cfg.head_dim, -2],  # a gate, a query, a gate
        "q_proj.bias": [cfg.head_dim, 2 * cfg.head_dim, -2],
        "in_proj_qkvz.weight": [*by_head, -2],
        "in_proj_ba.weight": [share - 1, share, -2],
        "in_proj_qkv.weight": [keys, 2 * keys, -2],
        "conv1d.weight": [keys, 2 * keys, -2],
        "A_log": [-2],
        "dt_bias": [-2],
    }
    parts = [
        (f"{name} {start}", parameter, [start, start + 1])
        for name, parameter in hf_model.named_parameters()
        for end, firsts in starts.items()
        if name.endswith(end)
        for start in firsts
        if start + 1 < len(parameter)
    ]
    parts += [
        (f"{name} taps", parameter.permute(2, 0, 1), [0, -1])
        for name, parameter in hf_model.named_parameters()
        if name.endswith("conv1d.weight")
    ]
    assert len(parts) >= 12
    for name, part, rows in parts:
        saved = part[rows].clone()
        part[rows] = saved.flip(0)
        yield name, expected_logits(hf_model, LENGTH)
        part[rows] = saved


def main() -> None:
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            hf_model = make_tiny_llama(Path(folder), **config)
            driver, expected = build_driver(Path(folder), LENGTH), expected_logits(hf_model, LENGTH)
            texts = [driver.logits(tokens(hf_model, LENGTH), chunks) for chunks in CHUNKS]
            errors = [float(np.abs(got - expected).max()) for got in texts]
            print(f"{name:30}", *(f"{error:.1e}" for error in errors))


if __name__ == "__main__":
    main()
