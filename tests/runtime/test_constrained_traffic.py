"""Random traffic of constrained and free requests: arrivals, aborts, preemptions, prefix hits,
plans of several steps. Each request gets the tokens that it gets alone.
"""

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from jengine.request import SamplingParams
from jengine.structured_outputs import StructuredOutputsParams
from jengine.text.tokenizer import Tokenizer
from tests.oracles.arrivals import Arrival, arrivals
from tests.oracles.core_pump import CorePump
from tests.oracles.grammars import PERSON, compact, grammar_of, satisfies

REGEX = StructuredOutputsParams(regex="([a-z]{3}[0-9] ){4}")
MIX: list[tuple[SamplingParams, StructuredOutputsParams | None]] = [
    (SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True), None),
    (SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), None),
    (SamplingParams(temperature=1.0, max_tokens=50), REGEX),
    (SamplingParams(temperature=0.7, top_p=0.9, max_tokens=50, ignore_eos=True), REGEX),
    (SamplingParams(temperature=1.0, max_tokens=56), compact(PERSON)),
    (SamplingParams(temperature=1.0, repetition_penalty=1.2, max_tokens=9, min_tokens=3),
     StructuredOutputsParams(regex="[a-z]*")),
    (SamplingParams(temperature=1.0, max_tokens=9), StructuredOutputsParams(choice=["yes", "no"])),
]  # fmt: skip


class Traffic:
    """A core whose pool is too small for its rows, and what each request gets alone."""

    def __init__(self, folder: Path) -> None:
        options = dict(load_format="auto", num_pages=22, max_decode_steps=4)
        self.pump = CorePump(folder, **options)
        self.oracle = CorePump(folder, **(options | {"max_decode_steps": 1}))
        self.tokenizer = Tokenizer.from_folder(folder)
        self._expected: dict[Arrival, list[int]] = {}

    def submit(self, request_id: str, arrival: Arrival) -> None:
        params, constraint = MIX[arrival.params]
        grammar = grammar_of(constraint) if constraint else ""
        self.pump.submit(request_id, prompt_of(arrival), params, seed=arrival.seed, grammar=grammar)

    def expected(self, arrival: Arrival) -> list[int]:
        if arrival not in self._expected:
            params, constraint = MIX[arrival.params]
            grammar = grammar_of(constraint) if constraint else ""
            self._expected[arrival] = self.oracle.alone(
                prompt_of(arrival), params, seed=arrival.seed, grammar=grammar
            )
        return self._expected[arrival]


def prompt_of(arrival: Arrival) -> list[int]:
    draw = random.Random(arrival.prompt_seed)
    return [draw.randrange(3, 300) for _ in range(arrival.prompt_length)]


@pytest.fixture(scope="module")
def traffic(tiny_llama: Path) -> Traffic:
    return Traffic(tiny_llama)


@given(arrivals(len(MIX), max_length=60, max_turns=6, max_size=6))
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_everyone_gets_the_tokens_of_a_run_alone(traffic: Traffic, arrivals: list[Arrival]) -> None:
    pump = traffic.pump
    pump.messages.clear()
    expected = {f"r{i}": traffic.expected(arrival) for i, arrival in enumerate(arrivals)}
    for i, arrival in enumerate(arrivals):
        for _ in range(arrival.turns_before):
            pump.turn()
        traffic.submit(f"r{i}", arrival)
    for i, arrival in enumerate(arrivals):
        if arrival.abort_after is not None:
            for _ in range(arrival.abort_after):
                pump.turn()
            pump.abort(f"r{i}")
    pump.drain()
    got, reasons = pump.tokens(), pump.finish_reasons()
    for i, arrival in enumerate(arrivals):
        tokens, reason = got.get(f"r{i}", []), reasons[f"r{i}"]
        if reason == "abort":
            assert tokens == expected[f"r{i}"][: len(tokens)]
            continue
        assert tokens == expected[f"r{i}"]
        constraint = MIX[arrival.params][1]
        if constraint is not None and reason == "stop":
            assert satisfies(constraint, traffic.tokenizer.decode(tokens))
    stats = pump.core.stats()
    assert (stats.num_pages_used, stats.num_compilations) == (0, 0)


def test_the_traffic_preempts(traffic: Traffic) -> None:
    """So that the test above means something."""
    before = traffic.pump.core.stats().num_preemptions
    for i in range(4):
        traffic.submit(f"p{i}", Arrival(i, 20, 4, i, 0, None))
    traffic.pump.drain()
    assert traffic.pump.core.stats().num_preemptions > before
