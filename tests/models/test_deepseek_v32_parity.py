"""DeepSeek-V3.2 and GLM-5 against Hugging Face transformers in float32: every way to cut the text
with the same bits, and the tokens and experts that each token of each layer is served by.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jengine.errors import LoadError
from jengine.input_processor import TokensPrompt
from jengine.kv_spec import build_groups
from jengine.layers import moe, sparse_mla
from jengine.layers.param import abstract_parameters
from jengine.llm import LLM
from jengine.models.registry import resolve_architecture
from jengine.request import SamplingParams
from tests.models.cases import by_default
from tests.oracles.tiny_llama import make_tiny_llama

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from tests.models.test_moe_parity import (  # imports both
    CHUNKS,
    LENGTH,
    TOLERANCE,
    build_driver,
    expected_logits,
    hf_routing,
    permuted,
    tokens,
)

PAGE = 16
# Of a query's last chosen token over the next: a difference in rounding is 1e-6.
MARGIN = 1e-5
SIZES = dict(
    num_key_value_heads=4, kv_lora_rank=48, qk_nope_head_dim=24, qk_rope_head_dim=16,
    v_head_dim=20, moe_intermediate_size=40, first_k_dense_replace=1, q_lora_rank=32,
    n_routed_experts=12, n_shared_experts=1, num_experts_per_tok=3, index_n_heads=8,
    index_head_dim=24, index_topk=8,
)  # fmt: skip
V32 = dict(SIZES, family="DeepseekV32", n_group=4, topk_group=2)
GLM = dict(SIZES, family="GlmMoeDsa")
YARN = {
    "rope_type": "yarn", "factor": 8.0, "mscale": 0.707, "mscale_all_dim": 1.4, "rope_theta": 1e4,
    "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "v32": V32,
    "v32-17-of-40": dict(V32, index_topk=17, num_hidden_layers=3, n_group=1, topk_group=1),
    "v32-all": dict(V32, index_topk=2048),
    "v32-yarn-bias": dict(V32, rope_parameters=YARN, attention_bias=True, index_n_heads=12),
    "v32-tied": dict(V32, tie_word_embeddings=True, norm_topk_prob=False, index_head_dim=16),
    "glm": GLM,
    "glm-shared-experts": dict(GLM, n_shared_experts=2, first_k_dense_replace=0),
}
Seen = list[tuple[int, np.ndarray]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, int | None], Seen]:
    """Record what a function gives on the device: (number of the traced call, result) of each."""

    def record(module: Any, name: str, part: int | None) -> Seen:
        seen: Seen = []
        function, traced = getattr(module, name), []

        def recording(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            number = len(traced)
            traced.append(number)
            kept = result if part is None else result[part]
            jax.debug.callback(lambda value: seen.append((number, np.asarray(value))), kept)
            return result

        monkeypatch.setattr(module, name, recording)
        return seen

    return record


def of_layer(seen: Seen, nth: int, num: int, chunks: list[int]) -> np.ndarray:
    """The rows of real tokens of the nth of `num` layers, over all steps."""
    steps = [found for number, found in seen if number % num == nth]
    return np.concatenate([found[:size] for found, size in zip(steps, chunks, strict=True)])


def hf_choices(hf_model: Any) -> list[np.ndarray]:
    """bool [T, T] of each layer: the tokens that each token attends to. No near tie decides that,
    nor an equality: of several heads one is always above zero.
    """
    found: list[np.ndarray] = []
    topk = torch.Tensor.topk

    def hook(module: Any, args: Any, output: Any) -> None:
        chosen = np.zeros((LENGTH, LENGTH), bool)
        np.put_along_axis(chosen, output[0].numpy().astype(np.int64), True, axis=1)
        found.append(chosen & np.tri(LENGTH, dtype=bool))

    def checked(scores: torch.Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        if scores.shape == (1, LENGTH, LENGTH) and k < LENGTH:
            best = np.sort(scores[0].numpy(), axis=1)[k:]  # queries that cannot take all they see
            gap = best[:, -k] - best[:, -k - 1]
            assert gap.min() > MARGIN, gap.min()
        return topk(scores, k, *args, **kwargs)

    hooks = [layer.self_attn.indexer.register_forward_hook(hook) for layer in hf_model.model.layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", checked)
        expected_logits(hf_model)
    for handle in hooks:
        handle.remove()
    return found


def as_mask(slots_Tk: np.ndarray) -> np.ndarray:
    """bool [T, T] of slots. The driver's pages are 1, 2, ... in order."""
    chosen = np.zeros((LENGTH, LENGTH), bool)
    rows, columns = np.nonzero(slots_Tk >= 0)
    chosen[rows, slots_Tk[rows, columns] - PAGE] = True
    return chosen


@pytest.mark.parametrize("name", by_default(CASES, "v32", "glm"))
def test_logits_tokens_and_experts_match_transformers(
    name: str, tmp_path: Path, recorded: Callable[[Any, str, int | None], Seen]
) -> None:
    routed = recorded(moe, "route_grouped", 0)
    selected = recorded(sparse_mla, "select_tokens", None)
    hf_model = make_tiny_llama(tmp_path, **CASES[name])
    driver = build_driver(tmp_path)
    (group,) = driver.runner.groups
    index_dim = CASES[name]["index_head_dim"]
    assert group.spec.bytes_per_entry == (48 + 16 + index_dim) * 4
    expected, routing = expected_logits(hf_model), hf_routing(hf_model)
    choices = hf_choices(hf_model)
    assert [c.sum(1).max() for c in choices] == [min(LENGTH, CASES[name]["index_topk"])] * len(
        choices
    )
    results, hidden = [], []
    for chunks in CHUNKS:
        routed.clear()
        selected.clear()
        results.append(driver.logits(tokens(hf_model), chunks))
        assert np.abs(results[-1] - expected).max() <= TOLERANCE, chunks
        hidden.append(driver.hidden)
        jax.effects_barrier()
        for nth, choice in enumerate(choices):
            ours = as_mask(of_layer(selected, nth, len(choices), chunks))
            np.testing.assert_array_equal(ours, choice, err_msg=f"{nth}: {chunks}")
        for nth, (_, ids) in enumerate(routing.values()):
            ours = of_layer(routed, nth, len(routing), chunks)
            np.testing.assert_array_equal(np.sort(ours, axis=1), np.sort(ids, axis=1))
    assert all(np.array_equal(h, hidden[0]) for h in hidden)
    # The comparison can fail: the same oracle with any one weight permuted is another model.
    changed = [*permuted(hf_model), *permuted_further(hf_model)]
    seen = [(n, np.abs(results[0] - e).max() > 10 * TOLERANCE) for n, e in changed]
    assert not [n for n, is_seen in seen if not is_seen and ".indexer." not in n]
    # Two rows of an indexer may change no choice; all of them do, unless every token is taken.
    indexers = {n.split()[0] for n, _ in seen if ".indexer." in n}
    assert len(indexers) == 5 * len(choices)
    seen_indexers = {n.split()[0] for n, is_seen in seen if is_seen and ".indexer." in n}
    assert seen_indexers == (set() if name == "v32-all" else indexers)


@torch.no_grad()
def permuted_further(hf_model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """As `permuted`, for the parts that it does not reach: the last rows, which rotate or expand
    values, all rows of the indexers, and the biases of the choice of experts.
    """
    ends = ("q_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight")
    parts = [(n, p, [-2, -1]) for n, p in hf_model.named_parameters() if n.endswith(ends)]
    named = hf_model.named_parameters()
    parts += [(n, p, [*range(len(p))]) for n, p in named if ".indexer." in n]
    for name, buffer in hf_model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            order = buffer.argsort()
            parts.append((name, buffer, [int(order[0]), int(order[-1])]))
    for name, part, rows in parts:
        saved = part[rows].clone()
        part[rows] = saved.flip(0)
        yield f"{name} {rows}", expected_logits(hf_model)
        part[rows] = saved


def test_neighbours_and_prefix_hits_change_no_token(tmp_path: Path) -> None:
    """In bfloat16: four requests together, then each alone, its first page from the cache."""
    one_layer: dict[str, Any] = dict(V32, num_hidden_layers=1, first_k_dense_replace=0)
    make_tiny_llama(tmp_path, **one_layer)
    prompts = [TokensPrompt(prompt_token_ids=[*range(5, 25), 30 + i]) for i in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(
        str(tmp_path), dtype="bfloat16", skip_tokenizer_init=True, num_pages=32, max_num_seqs=4,
        max_num_batched_tokens=32, keep_executables=False, prefill_buckets=(32,),
        decode_buckets=(1, 4),
    ) as llm:  # fmt: skip
        together = llm.generate(prompts, params)
        alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    assert all((output.num_cached_tokens or 0) >= PAGE for output in alone)
    found = [[output.outputs[0].token_ids for output in outputs] for outputs in (together, alone)]
    assert found[0] == found[1]
    assert len({tuple(ids) for ids in found[0]}) > 1


def read_config(architecture: str, fields: dict[str, Any]) -> Any:
    _, model_class = resolve_architecture({"architectures": [architecture]})
    return model_class, model_class.config_class.from_hf(
        fields, dtype="bfloat16", kv_dtype="bfloat16", max_model_len=64
    )


V32_FIELDS = dict(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
    num_attention_heads=128,
)  # fmt: skip


def test_published_sizes() -> None:
    """V3's 671 billion parameters and the indexers' 0.9; an entry of 576 + 128 values."""
    model_class, cfg = read_config("DeepseekV32ForCausalLM", V32_FIELDS)
    sizes = [int(np.prod(p.shape)) for p in abstract_parameters(model_class(cfg)).values()]
    assert sum(sizes) == pytest.approx(671.9e9, rel=0.001)
    (group,) = build_groups(model_class.kv_specs(cfg), PAGE)
    assert group.bytes_per_page == PAGE * 61 * (576 + 128) * 2


@pytest.mark.parametrize("family", ["DeepseekV32", "GlmMoeDsa"])
def test_defaults_are_those_of_transformers(family: str) -> None:
    """For a terse config.json, and for the whole one that transformers writes."""
    fields = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=6,
                  num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    theirs = getattr(transformers, f"{family}Config")(**fields)
    architecture = f"{family}ForCausalLM"
    _, cfg = read_config(architecture, fields)
    assert read_config(architecture, theirs.to_dict())[1] == cfg
    flat = {**vars(cfg), **vars(cfg.moe), **vars(cfg.mla)}
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
             "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "rms_norm_eps",
             "max_position_embeddings", "tie_word_embeddings", "attention_bias")  # fmt: skip
    assert [flat[name] for name in names] == [getattr(theirs, name) for name in names]
    index = (theirs.index_n_heads, theirs.index_head_dim, theirs.index_topk)
    assert (cfg.index.num_heads, cfg.index.head_dim, cfg.index.top_k) == index
    assert cfg.sparse_layers == tuple(kind == "sparse" for kind in theirs.mlp_layer_types)


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("DeepseekV32ForCausalLM", "q_lora_rank", None),
        ("DeepseekV32ForCausalLM", "layer_types", ["full_attention"] * 61),
        ("DeepseekV32ForCausalLM", "mlp_layer_types", ["sparse"] * 60 + ["dense"]),
        ("DeepseekV32ForCausalLM", "rope_interleave", False),
        ("GlmMoeDsaForCausalLM", "indexer_types", ["full", "shared"] * 30 + ["full"]),
        ("GlmMoeDsaForCausalLM", "index_topk_pattern", "FS" * 30 + "F"),
        ("GlmMoeDsaForCausalLM", "index_topk_freq", 4),
    ],
)
def test_what_is_not_supported_is_refused(architecture: str, field: str, value: Any) -> None:
    with pytest.raises(LoadError, match="another's indexer" if "index" in field else field):
        read_config(architecture, {**V32_FIELDS, field: value})
