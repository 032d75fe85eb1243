"""Families with routed experts against Hugging Face transformers in float32: every switch, every
way to cut the text, and the experts that each token of each layer goes to.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jengine.errors import LoadError
from jengine.input_processor import TokensPrompt
from jengine.llm import LLM
from jengine.models.registry import resolve_architecture
from jengine.request import SamplingParams
from tests.models.cases import by_default
from tests.oracles.driver import Driver
from tests.oracles.tiny_llama import make_tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
LENGTH = 40
CHUNKS = ([LENGTH], [7, 1, 16, 16], [1] * LENGTH)
MARGIN = 1e-4  # of a token's last chosen expert over the next: a difference in rounding is 1e-6
QWEN3 = dict(
    family="Qwen3Moe", num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40, head_dim=32
)
QWEN2 = dict(
    family="Qwen2Moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40,
    shared_expert_intermediate_size=56,
)  # fmt: skip
MIXTRAL = dict(family="Mixtral", num_local_experts=4, num_experts_per_tok=2)
GPT_OSS = dict(
    family="GptOss", num_local_experts=5, num_experts_per_tok=2, head_dim=16, sliding_window=12,
    attn_implementation="eager",  # the only one with sinks
    rope_parameters={
        "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 32, "rope_theta": 150000.0,
    },
)  # fmt: skip
TWO_GROUPS = ("qwen2-windows", "gpt-oss", "gpt-oss-clamped")
CASES: dict[str, dict[str, Any]] = {
    "qwen3": dict(QWEN3, norm_topk_prob=True),
    "qwen3-not-renormalised": dict(QWEN3, norm_topk_prob=False),
    "qwen3-some-layers-dense": dict(
        QWEN3, num_hidden_layers=4, mlp_only_layers=[3], decoder_sparse_step=2
    ),
    "qwen3-window": dict(QWEN3, use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "qwen3-bias-tied": dict(QWEN3, attention_bias=True, tie_word_embeddings=True),
    "qwen3-128-experts": dict(
        QWEN3, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=16
    ),
    "gpt-oss": GPT_OSS,
    "gpt-oss-clamped": dict(GPT_OSS, swiglu_limit=0.5, swiglu_alpha=1.2, num_hidden_layers=3),
    "qwen3-every-expert": dict(QWEN3, num_experts_per_tok=8),
    "mixtral": MIXTRAL,
    "mixtral-window": dict(MIXTRAL, sliding_window=12, num_local_experts=3),
    "qwen2": QWEN2,
    "qwen2-no-bias-dense": dict(QWEN2, qkv_bias=False, norm_topk_prob=True, mlp_only_layers=[0]),
    "qwen2-windows": dict(
        QWEN2, num_hidden_layers=3, use_sliding_window=True, sliding_window=12, max_window_layers=2
    ),
}  # fmt: skip


def tokens(hf_model: Any, length: int = LENGTH) -> list[int]:
    return np.random.default_rng(0).integers(3, hf_model.config.vocab_size, length).tolist()


def expected_logits(hf_model: Any, length: int = LENGTH) -> np.ndarray:
    with torch.no_grad():
        return hf_model(torch.tensor([tokens(hf_model, length)])).logits[0].numpy()


def build_driver(folder: Path, length: int = LENGTH) -> Driver:
    return Driver(
        folder, max_model_len=length + 24, num_pages=16, max_num_seqs=1,
        prefill_buckets=(length,), decode_buckets=(1,), max_num_batched_tokens=length,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", by_default(CASES, "qwen3", "gpt-oss", "mixtral", "qwen2", "qwen3-some-layers-dense")
)
def test_logits_and_experts_match_transformers(
    name: str, tmp_path: Path, routed: list[tuple[int, np.ndarray]]
) -> None:
    hf_model = make_tiny_llama(tmp_path, **CASES[name])
    driver = build_driver(tmp_path)
    assert len(driver.runner.groups) == (2 if name in TWO_GROUPS else 1)
    expected = expected_logits(hf_model)
    results = []
    for chunks in CHUNKS:
        routed.clear()
        results.append(driver.logits(tokens(hf_model), chunks))
        assert np.abs(results[-1] - expected).max() <= TOLERANCE, chunks
        jax.effects_barrier()
        check_experts(routed, chunks, hf_routing(hf_model))
    # The comparison can fail: the same oracle with any one weight permuted is another model.
    unseen = [n for n, e in permuted(hf_model) if np.abs(results[0] - e).max() <= 10 * TOLERANCE]
    assert not unseen


def check_experts(
    routed: list[tuple[int, np.ndarray]],
    chunks: list[int],
    expected: dict[int, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Every token of every layer goes to the experts that it goes to in the oracle, and no near tie
    decides that.
    """
    for nth, (logits, ids) in enumerate(expected.values()):
        ranked, k = np.sort(logits, axis=1), ids.shape[1]
        assert k == ranked.shape[1] or (ranked[:, -k] - ranked[:, -k - 1]).min() > MARGIN
        steps = [got for number, got in routed if number % len(expected) == nth]
        cut = [got[:size] for got, size in zip(steps, chunks, strict=True)]
        got = np.sort(np.concatenate(cut), axis=1)
        np.testing.assert_array_equal(got, np.sort(ids, axis=1), err_msg=f"{nth}: {chunks}")


@torch.no_grad()
def permuted(hf_model: Any, length: int = LENGTH) -> Iterator[tuple[str, np.ndarray]]:
    """(parameter, the oracle's logits with two of its rows or entries swapped), one by one."""
    routing = hf_routing(hf_model, length)
    used = {i: np.argsort(-np.bincount(ids.ravel())) for i, (_, ids) in routing.items()}
    for name, parameter in hf_model.named_parameters():
        for part, rows in swaps(name, parameter, tokens(hf_model, length)[:2], used):
            saved = part[rows].clone()
            part[rows] = saved.flip(0)
            yield f"{name} {list(part.shape)} {rows}", expected_logits(hf_model, length)
            part[rows] = saved


def swaps(
    name: str, parameter: Any, ids: list[int], used: dict[int, np.ndarray]
) -> list[tuple[Any, list[int]]]:
    """(part of the parameter, two of its rows). Of what there is for each expert: the two
    most used; in stacked ones also rows of both ends, and columns.
    """
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return [(parameter, ids)]
    if len(parameter) == 1:
        return [(parameter[0], [0, 1])]
    if not re.search(r"mlp\.(gate\.|router\.|experts\.)", name):
        return [(parameter, [0, 1])]
    experts = used[int(name.split(".")[2])][:2].tolist()
    if parameter.ndim < 2:
        return [(parameter, experts)]
    parts = [(parameter[e], rows) for e in experts for rows in ([0, 1], [-2, -1])]
    parts += [(parameter[e].T, [0, 1]) for e in experts if parameter.ndim == 3]
    return [(parameter, experts), *parts]


def hf_routing(hf_model: Any, length: int = LENGTH) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """(router logits [T, E], expert ids [T, k]) of every layer that has a router."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            found[layer] = (output[0].numpy(), output[2].numpy())

        return hook

    layers = enumerate(hf_model.model.layers)
    parts = [(i, dict(layer.mlp.named_children())) for i, layer in layers]
    routers = [(i, part) for i, p in parts if (part := p.get("gate", p.get("router")))]
    hooks = [router.register_forward_hook(keep(i)) for i, router in routers]
    expected_logits(hf_model, length)
    for hook in hooks:
        hook.remove()
    return found


def test_neighbours_change_no_token(tmp_path: Path) -> None:
    """Requests that share experts, in bfloat16: each alone, and all together."""
    make_tiny_llama(tmp_path, **CASES["qwen3"])
    prompts = [TokensPrompt(prompt_token_ids=[5 + i, 6, 7, 9 * i]) for i in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(
        str(tmp_path), dtype="bfloat16", skip_tokenizer_init=True, num_pages=32, max_num_seqs=4,
        max_num_batched_tokens=32, keep_executables=False,
    ) as llm:  # fmt: skip
        together = llm.generate(prompts, params)
        alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    tokens = [[output.outputs[0].token_ids for output in outputs] for outputs in (together, alone)]
    assert tokens[0] == tokens[1]
    assert len({tuple(ids) for ids in tokens[0]}) == 4


def test_another_activation_is_refused() -> None:
    _, model_class = resolve_architecture({"architectures": ["MixtralForCausalLM"]})
    fields = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                  num_attention_heads=8, hidden_act="gelu_pytorch_tanh")  # fmt: skip
    with pytest.raises(LoadError, match="hidden_act"):
        model_class.config_class.from_hf(
            fields, dtype="float32", kv_dtype="float32", max_model_len=8
        )
