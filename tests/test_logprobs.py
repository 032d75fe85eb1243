"""Log-probabilities by teacher forcing: the bits of what was generated, and a gradient."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jengine import LLM, SamplingParams
from jengine.beam_search import BeamSearch, BeamSearchParams
from jengine.errors import InvalidRequestError
from jengine.outputs import Logprob
from tests.oracles.tiny_llama import make_tiny_llama

VOCAB_SIZE = 4096


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, make_tiny_llama(folder, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def llm(tiny: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(
        str(tiny[0]),
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=96,
        max_model_len=96,
        decode_buckets=(8,),
        prefill_buckets=(128,),
        cache_dir=str(tmp_path_factory.mktemp("executables")),
    ) as llm:
        yield llm


def test_a_rollout_has_the_bits_of_the_training_pass(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB_SIZE, n).tolist() for n in (5, 21, 40, 17, 80, 33)]
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    seeded = greedy.clone(temperature=1.0, seed=3, top_p=0.95)
    params = [greedy, seeded, seeded.clone(n=3), greedy, seeded.clone(max_tokens=16), greedy]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert len(outputs[4].outputs[0].token_ids) + 80 == 96, "one ends at the model's length"
    expected = [
        [position[token].logprob for token, position in zip(c.token_ids, c.logprobs, strict=True)]
        for output in outputs
        for c in output.outputs
        if c.logprobs is not None
    ]
    got = llm.logprobs(outputs)
    assert [scores.tolist() for scores in got] == expected
    alone = llm.logprobs([(prompts[1], outputs[1].outputs[0].token_ids)])
    assert alone[0].tolist() == expected[1]


def test_gradients_are_those_of_transformers(llm: LLM, tiny: tuple[Path, Any]) -> None:
    rng = np.random.default_rng(1)
    texts = [rng.integers(3, VOCAB_SIZE, n).tolist() for n in (19, 7)]
    ids = jnp.array(texts[0] + texts[1] + [0] * 6, jnp.int32)
    lengths = jnp.array([19, 7], jnp.int32)
    weights = jnp.array(rng.standard_normal(32), jnp.float32)
    logprobs = llm.logprobs_fn()

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return -jnp.vdot(weights, logprobs(params, ids, lengths))

    value, grads = jax.jit(jax.value_and_grad(loss))(llm.params)

    model = tiny[1]
    model.zero_grad()
    total = torch.zeros(())
    start = 0
    for text in texts:
        scores = model(torch.tensor([text])).logits[0].log_softmax(-1)
        chosen = scores[torch.arange(len(text) - 1), torch.tensor(text[1:])]
        w = torch.tensor(np.asarray(weights)[start + 1 : start + len(text)])
        total = total - (chosen * w).sum()
        start += len(text)
    total.backward()
    np.testing.assert_allclose(float(value), total.item(), rtol=1e-5)

    theirs = {name.removeprefix("model."): p.grad.numpy() for name, p in model.named_parameters()}
    for layer in ("layers.0", "layers.1"):
        for fused, parts in (("self_attn.qkv", "self_attn.{}"), ("mlp.gate_up", "mlp.{}")):
            names = ("q", "k", "v") if "attn" in fused else ("gate", "up")
            grads_of_parts = [
                theirs.pop(f"{layer}.{parts.format(name)}_proj.weight") for name in names
            ]
            theirs[f"{layer}.{fused}_proj.weight"] = np.concatenate(grads_of_parts)
    assert theirs.keys() == grads.keys()
    for name, expected in theirs.items():
        limit = 32**0.5 * 1e-6 * np.abs(expected).max()  # sums over the tokens
        np.testing.assert_allclose(grads[name], expected, rtol=0, atol=limit, err_msg=name)


def test_what_cannot_be_scored_is_named(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        llm.logprobs([([5], [VOCAB_SIZE])])
    with pytest.raises(InvalidRequestError, match="length is 96"):
        llm.logprobs([([5] * 90, [5] * 7)])


def test_beams_are_those_of_transformers(llm: LLM, tiny: tuple[Path, Any]) -> None:
    prompts = [np.random.default_rng(i).integers(3, VOCAB_SIZE, 20 + i).tolist() for i in (0, 1)]
    params = BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    hits = prefix_hits(llm)
    outputs = llm.beam_search(prompts, params)
    assert prefix_hits(llm) > hits, "beams share their pages"
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            theirs = tiny[1].generate(
                torch.tensor([prompt]), num_beams=4, num_return_sequences=4, max_new_tokens=6,
                do_sample=False, eos_token_id=None, length_penalty=1.0, output_scores=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        assert [beam.tokens for beam in output.sequences] == theirs.sequences.tolist()
        np.testing.assert_allclose(
            [beam.cum_logprob / 6 for beam in output.sequences],
            theirs.sequences_scores.tolist(),
            atol=1e-5,
        )
        assert all(beam.finish_reason == "length" for beam in output.sequences)


def test_beams_that_end_compete_by_length(llm: LLM) -> None:
    """A search driven by hand: scores by exhaustive enumeration."""
    steps = {
        (): [0.6, 0.3, 0.1],
        (0,): [0.2, 0.5, 0.3],
        (1,): [0.1, 0.1, 0.8],
        (2,): [0.3, 0.3, 0.4],
    }
    eos, prompt = 2, [7, 7]
    params = BeamSearchParams(beam_width=3, max_tokens=2, length_penalty=2.0)
    search = BeamSearch(prompt, params, [eos])
    while search.beams:
        search.advance(
            [
                {t: Logprob(float(np.log(p))) for t, p in enumerate(steps[tuple(b.tokens[2:])])}
                for b in search.beams
            ]
        )
    endings: dict[tuple[int, ...], float] = {(eos,): steps[()][eos]}
    for first in (0, 1):
        for second in (0, 1, 2):
            endings[first, second] = steps[()][first] * steps[first,][second]
    scores = {
        text: np.log(p) / (len(prompt) + len(text) - (text[-1] == eos)) ** 2.0
        for text, p in endings.items()
    }
    expected = sorted(scores, key=lambda text: -scores[text])[:3]
    assert [tuple(beam.tokens[2:]) for beam in search.best()] == expected
    with pytest.raises(InvalidRequestError, match="beam_width: must be at most 10"):
        llm.beam_search([prompt], BeamSearchParams(beam_width=11, max_tokens=2))


def prefix_hits(llm: LLM) -> float:
    (metric,) = (m for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
    return metric.value
