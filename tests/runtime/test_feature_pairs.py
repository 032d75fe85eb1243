"""Every pair of features in one request of the real engine, among companions. What each feature
promises is checked in every pair; docs/compatibility.md is this table.

`python -m tests.runtime.test_feature_pairs` writes the page anew.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jengine import LLM, Parameter, RequestOutput, SamplingParams, logits_processor
from jengine.structured_outputs import StructuredOutputsParams

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
MAX_TOKENS, CHUNK, PAGE_SIZE = 8, 32, 16
FORBIDDEN = tuple(range(20, 60))


@logits_processor(first=Parameter("int32"), count=Parameter("int32"))
def forbid(logits: Any, context: Any) -> Any:
    import jax.numpy as jnp

    tokens = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    first, count = (context.params[name][:, None] for name in ("first", "count"))
    return jnp.where((tokens >= first) & (tokens < first + count), -jnp.inf, logits)


@dataclasses.dataclass
class Run:
    """A pair's request: its answers cold, and again with the prompt cached."""

    llm: LLM
    params: SamplingParams
    cold: RequestOutput
    warm: RequestOutput
    steps: list[int]  # most decode steps of a dispatch, of both answers
    twin: RequestOutput  # the same request alone, without what cannot be combined


@dataclasses.dataclass(frozen=True)
class Feature:
    name: str
    params: dict[str, Any]
    check: Callable[[Run], None]
    prompt_length: int = 24


def check_chunks(run: Run) -> None:
    assert len(run.cold.prompt_token_ids) > 2 * CHUNK


def check_prefix(run: Run) -> None:
    reads = run.params.prompt_logprobs is None
    assert (run.warm.num_cached_tokens or 0) >= (PAGE_SIZE if reads else 0)
    assert reads or not run.warm.num_cached_tokens
    assert tokens(run.warm) == tokens(run.cold)


def check_logprobs(run: Run) -> None:
    expected = run.llm.logprobs([run.cold])
    for scores, completion in zip(expected, run.cold.outputs, strict=True):
        assert completion.logprobs is not None
        got = [p[t].logprob for t, p in zip(completion.token_ids, completion.logprobs, strict=True)]
        np.testing.assert_allclose(got, scores, atol=1e-5)


def check_prompt_logprobs(run: Run) -> None:
    prompt = run.cold.prompt_token_ids
    (expected,) = run.llm.logprobs([(prompt[:1], prompt[1:])])
    assert run.cold.prompt_logprobs is not None
    got = [p[t].logprob for t, p in zip(prompt, run.cold.prompt_logprobs, strict=True) if p]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def check_structure(run: Run) -> None:
    for completion in run.cold.outputs:
        assert re.fullmatch("[a-f]{1,40}", completion.text), completion.text


def check_n(run: Run) -> None:
    assert len(run.cold.outputs) == 3
    assert len({tuple(completion.token_ids) for completion in run.cold.outputs}) > 1


def check_penalties(run: Run) -> None:
    """The largest there are: nothing is said twice while something else may be said."""
    if run.params.structured_outputs is None:
        for completion in run.cold.outputs:
            assert len(set(completion.token_ids)) == len(completion.token_ids)


def check_seed(run: Run) -> None:
    assert tokens(run.cold) == tokens(run.twin)


def check_steps(run: Run) -> None:
    in_between = run.params.logprobs is not None or run.params.structured_outputs is not None
    assert max(run.steps) == (1 if in_between else 4)


def check_processor(run: Run) -> None:
    for completion in run.cold.outputs:
        assert not set(completion.token_ids) & set(FORBIDDEN)


FEATURES = (
    Feature("chunked prefill", {}, check_chunks, prompt_length=70),
    Feature("prefix cache", {}, check_prefix),
    Feature("logprobs", dict(logprobs=2), check_logprobs),
    Feature("prompt_logprobs", dict(prompt_logprobs=1), check_prompt_logprobs),
    Feature(
        "structured outputs",
        dict(structured_outputs=StructuredOutputsParams(regex="[a-f]{1,40}"), max_tokens=48),
        check_structure,
    ),
    Feature("n", dict(n=3, temperature=1.0, seed=5), check_n),
    Feature(
        "penalties",
        dict(presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=100.0),
        check_penalties,
    ),
    Feature("seed", dict(temperature=1.0, top_p=0.95, seed=11), check_seed),
    Feature("several steps a dispatch", {}, check_steps),
    Feature("logits processors", dict(extra_args={"first": 20, "count": 40}), check_processor),
)
NOTES = {
    frozenset({"prompt_logprobs", "prefix cache"}): "computes every token",
    frozenset({"logprobs", "several steps a dispatch"}): "one step",
    frozenset({"structured outputs", "several steps a dispatch"}): "one step",
}
PAIRS = list(itertools.combinations(FEATURES, 2))


@pytest.fixture(scope="module")
def llm(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(
        str(tiny_llama),
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=CHUNK,
        max_decode_steps=4,
        num_gpu_blocks_override=96,
        block_size=PAGE_SIZE,
        decode_buckets=(8,),
        prefill_buckets=(CHUNK,),
        logits_processors=[forbid],
        cache_dir=str(tmp_path_factory.mktemp("executables")),
    ) as llm:
        yield llm


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name} + {pair[1].name}")
def test_a_pair(pair: tuple[Feature, Feature], llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair
    defaults: dict[str, Any] = dict(temperature=0.0, max_tokens=MAX_TOKENS)
    params = SamplingParams(
        **(defaults | one.params | other.params),
        ignore_eos="structured outputs" not in (one.name, other.name),
    )
    length = max(one.prompt_length, other.prompt_length)
    prompt = np.random.default_rng(length).integers(3, 400, length).tolist()
    # Whole characters before the completion, whatever the random ones are.
    prompt[-4:] = llm.get_tokenizer().encode("abcd", add_special_tokens=False)[:4]
    companion = SamplingParams(temperature=0.7, seed=2, max_tokens=5, ignore_eos=True)
    steps: list[int] = []
    runner = llm._core.runner
    dispatch = runner.dispatch

    def spy(plan: Any) -> Any:
        steps.append(plan.num_steps)
        return dispatch(plan)

    def ask(*companions: SamplingParams) -> RequestOutput:
        prompts = [prompt, *([7, 8, 9 + i] for i in range(len(companions)))]
        return llm.generate(prompts, [params, *companions], use_tqdm=False)[0]

    assert llm.reset_prefix_cache()
    twin = ask()
    assert llm.reset_prefix_cache()
    cold = ask(companion, companion)
    monkeypatch.setattr(runner, "dispatch", spy)
    warm = ask()
    run = Run(llm, params, cold, warm, steps, twin)
    assert tokens(cold) == tokens(twin)
    one.check(run)
    other.check(run)


def tokens(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


def table() -> str:
    names = [feature.name for feature in FEATURES]
    head = ["", *names[1:]]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for i, name in enumerate(names[:-1]):
        cells = [
            "" if j <= i else NOTES.get(frozenset({name, other}), "yes")
            for j, other in enumerate(names)
        ][1:]
        lines.append(f"| **{name}** | {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    return f"""# Which features go together

All of them. Each cell is a test (`tests/runtime/test_feature_pairs.py`, which writes this page):
one request with both features on the real engine, among companions, cold and with its prompt
cached, in which each feature keeps its promise, and whose tokens are those of the request alone.

{table()}

"one step": the host has to look at every token, so a dispatch holds one step while such a request
runs; tokens are the same. "computes every token": prompt log-probabilities need every position of
the prompt, so cached pages are not read.

The families that the engine runs are compared with transformers one by one, whole, in chunks and
token by token (`tests/models/`); sampling comes after them and does not know which one it serves.
"""


def test_the_page_is_this_table() -> None:
    assert PAGE.read_text("utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
