"""Constrained requests in a real engine core, with everything else that a request may ask for."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jengine.grammar import limits
from jengine.protocol import CoreOutput, Refusal
from jengine.request import SamplingParams
from jengine.structured_outputs import StructuredOutputsParams
from jengine.text.tokenizer import Tokenizer
from tests.oracles.core_pump import CorePump
from tests.oracles.grammars import PERSON, compact, grammar_of, many_schemas, satisfies

WORD = StructuredOutputsParams(regex="[a-z]{3,9}-[0-9]{2}")
CHOICE = StructuredOutputsParams(choice=["yes", "no", "maybe later", 'quo"te', "naïve"])
CONSTRAINTS = [WORD, CHOICE, compact(PERSON), compact(many_schemas(3)[2])]
PROMPTS = [[5 + i, 40, 41, 42, 43 + i, 7] for i in range(8)]
FREE = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)


def random_params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 100, **fields})


@pytest.fixture(scope="module")
def pump(tiny_llama: Path) -> CorePump:
    return CorePump(tiny_llama, load_format="auto", max_num_seqs=8, num_pages=160)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_llama)


@pytest.fixture(autouse=True)
def _clean(pump: CorePump) -> Iterator[None]:
    yield
    pump.drain()
    assert pump.core.stats().num_pages_used == 0
    assert pump.core.stats().num_compilations == 0
    pump.messages.clear()


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def submit(pump: CorePump, name: str, constraint: StructuredOutputsParams | None, index: int = 0,
           **fields: Any) -> None:  # fmt: skip
    """Request `index`: its prompt and its seed."""
    grammar = grammar_of(constraint) if constraint else ""
    params = random_params(**fields) if constraint or fields else FREE
    pump.submit(name, PROMPTS[index % 8], params, seed=index, grammar=grammar)


def alone(pump: CorePump, constraint: StructuredOutputsParams, index: int = 0, **fields: Any):
    params = random_params(**fields)
    return pump.alone(PROMPTS[index % 8], params, seed=index, grammar=grammar_of(constraint))


def last_output(pump: CorePump, name: str) -> CoreOutput:
    return pump.outputs()[name][-1]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.kind)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_tokens_satisfy_the_constraint(
    pump: CorePump, tokenizer: Tokenizer, constraint: StructuredOutputsParams, temperature: float
) -> None:
    for i in range(8):
        submit(pump, str(i), constraint, i, temperature=temperature)
    pump.drain()
    reasons = pump.finish_reasons()
    for name, tokens in pump.tokens().items():
        if reasons[name] == "stop":
            assert satisfies(constraint, text_of(tokenizer, tokens)), tokens
    assert list(reasons.values()).count("stop") >= (7 if temperature else 1)


def test_the_end_is_text_unless_it_is_the_end_of_sequence(
    pump: CorePump, tokenizer: Tokenizer
) -> None:
    submit(pump, "closed", CHOICE)
    open_end = StructuredOutputsParams(regex="[a-z]{1,99}")
    for i in range(8):
        submit(pump, f"open{i}", open_end, i, logit_bias={2: 5.0})
    pump.drain()
    assert last_output(pump, "closed").ends_in_text
    for i in range(8):
        output, tokens = last_output(pump, f"open{i}"), pump.tokens()[f"open{i}"]
        assert output.finish_reason == "stop"
        assert output.ends_in_text == (tokens[-1] != 2)
        assert satisfies(open_end, text_of(tokenizer, tokens))


def test_neighbours_get_the_tokens_that_they_get_without(pump: CorePump) -> None:
    expected = [pump.alone(PROMPTS[i], FREE, seed=i) for i in range(4)]
    constrained = [alone(pump, CONSTRAINTS[i], i) for i in range(4)]
    for i in range(4):
        submit(pump, f"free{i}", None, i)
        submit(pump, f"bound{i}", CONSTRAINTS[i], i)
    pump.drain()
    tokens = pump.tokens()
    assert [tokens[f"free{i}"] for i in range(4)] == expected
    assert [tokens[f"bound{i}"] for i in range(4)] == constrained


def test_plain_steps_bring_no_masks(pump: CorePump, monkeypatch: pytest.MonkeyPatch) -> None:
    masked: dict[bool, int] = {True: 0, False: 0}
    dispatch = pump.core.runner.dispatch

    def record(plan: Any) -> Any:
        handle = dispatch(plan)
        bound = any(e.samples and e.request.constraint is not None for e in plan.scheduled)
        assert (handle.batch.masks is not None) == bound
        masked[bound] += 1
        return handle

    monkeypatch.setattr(pump.core.runner, "dispatch", record)
    submit(pump, "bound", WORD)
    submit(pump, "free", None, 1)
    pump.drain()
    assert masked[True] and masked[False]


def test_a_constrained_request_waits_for_its_token_and_others_do_not(
    pump: CorePump, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[list[str]] = []
    dispatch = pump.core.runner.dispatch
    monkeypatch.setattr(
        pump.core.runner,
        "dispatch",
        lambda plan: plans.append([e.request.request_id for e in plan.scheduled]) or dispatch(plan),
    )
    submit(pump, "bound", WORD)
    submit(pump, "free", None, 1)
    pump.drain()
    both = [plan for plan in plans if "bound" in plan]
    assert len(plans) > len(both), "the other one went on while the token was on its way"
    assert sum("free" in plan for plan in plans) == 24


def test_chunked_prefill_and_prefix_hits(pump: CorePump, tokenizer: Tokenizer) -> None:
    prompt = [3 + i % 60 for i in range(90)]  # three steps of 32 tokens
    for name in ("cold", "warm"):
        pump.submit(name, prompt, random_params(max_tokens=30), seed=4, grammar=grammar_of(WORD))
        pump.drain()
    tokens = pump.tokens()
    assert tokens["cold"] == tokens["warm"]
    assert satisfies(WORD, text_of(tokenizer, tokens["cold"]))
    assert last_output(pump, "warm").num_cached_tokens > 0


def test_preemption_keeps_the_place_in_the_grammar(tiny_llama: Path, tokenizer: Tokenizer) -> None:
    pump = CorePump(tiny_llama, load_format="auto", max_num_seqs=4, num_pages=20)
    long = StructuredOutputsParams(regex="([a-z]{4}[0-9]{2} ){12}")
    expected = [alone(pump, long, i, max_tokens=90) for i in range(4)]
    for i in range(4):
        submit(pump, str(i), long, i, max_tokens=90)
    pump.drain()
    assert pump.core.stats().num_preemptions > 0
    assert [pump.tokens()[str(i)] for i in range(4)] == expected
    for tokens in expected:
        assert satisfies(long, text_of(tokenizer, tokens))


def test_several_decode_steps_are_off_beside_constrained_requests(tiny_llama: Path) -> None:
    pump = CorePump(tiny_llama, load_format="auto", num_pages=64, max_decode_steps=4)
    expected = pump.alone(PROMPTS[1], FREE, seed=1), alone(pump, WORD)
    steps: list[tuple[int, bool]] = []
    dispatch = pump.core.runner.dispatch

    def record(plan: Any) -> Any:
        steps.append((plan.num_steps, any(e.request.constraint for e in plan.scheduled)))
        return dispatch(plan)

    pump.core.runner.dispatch = record  # type: ignore[method-assign]
    submit(pump, "free", None, 1)
    submit(pump, "bound", WORD)
    pump.drain()
    assert (pump.tokens()["free"], pump.tokens()["bound"]) == expected
    assert all(num_steps == 1 for num_steps, is_bound in steps if is_bound)
    assert any(num_steps > 1 for num_steps, _ in steps), "once it has ended, they are on again"


# What else a request may ask for, and a constraint to go with it
WITH: dict[str, tuple[dict[str, Any], StructuredOutputsParams]] = {
    "penalties": ({"repetition_penalty": 1.5, "presence_penalty": 1.0}, WORD),
    "truncation": ({"top_k": 20, "top_p": 0.8, "min_p": 0.01}, compact(PERSON)),
    "bias": ({"logit_bias": {70: 9.0, 71: 9.0}}, WORD),
    "logprobs": ({"logprobs": 3}, WORD),
    "min_tokens": ({"min_tokens": 12}, StructuredOutputsParams(regex="[a-z]{0,400}")),
    "bad_words": ({"bad_word_ids": [[68], [69], [70, 71]]}, WORD),
    "ignore_eos": ({"ignore_eos": True}, StructuredOutputsParams(regex="[a-z]{1,6}")),
}


@pytest.mark.parametrize("name", WITH)
def test_together_with(pump: CorePump, tokenizer: Tokenizer, name: str) -> None:
    fields, constraint = WITH[name]
    for i in range(6):
        submit(pump, str(i), constraint, i, **fields)
    pump.drain()
    for i in range(6):
        tokens, outputs = pump.tokens()[str(i)], pump.outputs()[str(i)]
        assert outputs[-1].finish_reason == "stop" or name == "min_tokens"
        assert satisfies(constraint, text_of(tokenizer, tokens))
        if name == "logprobs":
            entries = [entry for output in outputs for entry in output.logprobs or ()]
            assert [entry.token_ids[0] for entry in entries] == tokens
        if name == "min_tokens":
            assert len(tokens) >= 12
        if name == "bad_words":
            assert not {68, 69} & set(tokens)
            assert (70, 71) not in set(itertools.pairwise(tokens))
        if name == "ignore_eos":
            assert len(text_of(tokenizer, tokens)) == 6 and 2 not in tokens


def test_allowed_token_ids(pump: CorePump, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abc-12", add_special_tokens=False)
    submit(pump, "some", WORD, allowed_token_ids=ids + tokenizer.encode("c"))
    submit(pump, "none", WORD, allowed_token_ids=tokenizer.encode("-"))
    pump.drain()
    text = text_of(tokenizer, pump.tokens()["some"])
    assert satisfies(WORD, text) and set(text) <= set("abc-12")
    output = last_output(pump, "none")
    assert output.refusal is Refusal.INVALID
    assert output.error is not None and "every token" in output.error


def test_stop_ids_end_it_as_ever(pump: CorePump, tokenizer: Tokenizer) -> None:
    letters = [t for c in "abcdefghijklmnop" for t in tokenizer.encode(c)]
    submit(pump, "r", StructuredOutputsParams(regex="[a-z]{60}"), stop_token_ids=letters)
    pump.drain()
    output = last_output(pump, "r")
    assert (output.finish_reason, output.stop_reason) == ("stop", pump.tokens()["r"][-1])
    assert not output.ends_in_text


def test_length_ends_it_as_ever(pump: CorePump) -> None:
    submit(pump, "r", StructuredOutputsParams(regex="[a-z]{60}"), max_tokens=5)
    pump.drain()
    assert pump.finish_reasons()["r"] == "length"
    assert len(pump.tokens()["r"]) == 5


def test_not_streamed(pump: CorePump) -> None:
    expected = alone(pump, WORD)
    pump.submit("r", PROMPTS[0], random_params(), is_streamed=False, grammar=grammar_of(WORD))
    pump.drain()
    (output,) = pump.outputs()["r"]
    assert (output.new_token_ids, output.finish_reason) == (expected, "stop")


def test_a_grammar_that_gets_out_of_hand_ends_its_request_only(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_ITEMS_IN_ROW", 60)
    pump = CorePump(tiny_llama, load_format="auto", num_pages=64)
    expected = pump.alone(PROMPTS[1], FREE, seed=1)
    ambiguous = StructuredOutputsParams(grammar='start: start start | "a" | ')
    submit(pump, "wild", ambiguous, ignore_eos=True)
    submit(pump, "free", None, 1)
    pump.drain()
    output = last_output(pump, "wild")
    assert output.finish_reason == "error"
    assert output.error is not None and output.error.startswith("structured_outputs: ")
    assert pump.tokens()["free"] == expected


def test_what_cannot_be_compiled_is_refused(pump: CorePump) -> None:
    """The front end has tried it out; the core does not rely on it."""
    pump.submit("bad", PROMPTS[0], random_params(), grammar="start: nothing")
    submit(pump, "good", WORD)
    pump.drain()
    output = last_output(pump, "bad")
    assert output.refusal is Refusal.INVALID
    assert output.error is not None and "nothing" in output.error
    assert pump.finish_reasons()["good"] == "stop"


def test_abort_while_the_grammar_is_compiled(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pump = CorePump(tiny_llama, load_format="auto", num_pages=64)
    gate = threading.Event()
    load = pump.core._load_vocabulary
    monkeypatch.setattr(
        pump.core._matchers, "_load_vocabulary", lambda eos: gate.wait(60) and load(eos)
    )
    submit(pump, "gone", WORD)
    submit(pump, "stays", WORD)
    submit(pump, "free", None, 1)
    while not pump.tokens().get("free"):
        pump.turn()
    assert pump.core.stats().num_waiting == 2
    pump.abort("gone")
    pump.turn()
    assert pump.finish_reasons()["gone"] == "abort"
    gate.set()
    pump.drain()
    assert pump.finish_reasons() == {"gone": "abort", "stays": "stop", "free": "length"}


def test_abort_between_two_tokens(pump: CorePump) -> None:
    long = StructuredOutputsParams(regex="[a-z]{300}")
    submit(pump, "r", long)
    while len(pump.tokens().get("r", [])) < 3:
        pump.turn()
    pump.abort("r")
    pump.drain()
    assert pump.finish_reasons()["r"] == "abort"


def test_equal_grammars_are_compiled_once(pump: CorePump) -> None:
    before = pump.core.stats()
    constraint = StructuredOutputsParams(regex="[a-z]{2}equal")
    for i in range(8):
        submit(pump, str(i), constraint, i)
    pump.drain()
    after = pump.core.stats()
    assert after.num_grammars == before.num_grammars + 1
    num_tokens = sum(map(len, pump.tokens().values()))
    assert 0 < after.num_masks - before.num_masks <= num_tokens + 8
    assert after.mask_seconds > before.mask_seconds
