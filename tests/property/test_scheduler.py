"""Whatever the scheduler does, each request gets the tokens that it would get alone.

Random arrivals, chunk sizes, prefix hits, tiny pools, aborts and depths of run-ahead, against a
model that computes with what it finds in the pages (`tests/core/fake_device.py`).
"""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from jengine.config import SchedulerConfig
from jengine.core.kv_manager import KVManager
from jengine.core.page_pool import NULL_PAGE
from jengine.core.plan import StepPlan, StepResult
from jengine.core.scheduler import Scheduler
from jengine.request import FinishReason, Request
from tests.core.factories import (
    EOS,
    Every,
    Window,
    make_groups,
    make_kv,
    make_request,
    record_allocations,
    tokens_of_whole_entries,
)
from tests.core.fake_device import FakeDevice, naive_tokens

MAX_MODEL_LEN = 36
MAX_STEPS = 2000
# One entry a layer; layers of equal window share a group. Window 1 reads nothing but itself.
MODELS: list[tuple[Window, ...]] = [
    (None, None),
    (None, 5),
    (3, 3),
    (None, 4, 9),
    (2, 7),
    (1, None),
    ("state", "state", None),
    ("state", 4, None),
    ("state", "state"),
    (Every(2), None),
    (Every(1), Every(4), 3, "state"),
]


@dataclass(frozen=True)
class Client:
    """One request and when things happen to it, in steps."""

    request: Request
    arrives: int
    aborts: int | None


@dataclass(frozen=True)
class Scenario:
    windows: tuple[Window, ...]
    page_size: int
    spare_pages: int  # beyond what the longest request needs alone
    caching: bool
    config: SchedulerConfig
    run_ahead: int
    clients: tuple[Client, ...]
    timing_seed: int  # when results are collected before they must be


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    budget = draw(st.integers(1, 24))
    bases = draw(
        st.lists(st.lists(st.integers(0, 3), min_size=20, max_size=20), min_size=2, max_size=2)
    )
    clients = []
    for i in range(draw(st.integers(3, 8))):
        base = draw(st.sampled_from(bases))
        tail = draw(st.lists(st.integers(0, 3), max_size=4))
        prompt = base[: draw(st.integers(1, 20))] + tail
        max_tokens = draw(st.one_of(st.none(), st.integers(1, 15), st.just(15)))
        request = make_request(
            str(i),
            prompt,
            priority=draw(st.integers(0, 2)),
            cache_salt=draw(st.sampled_from(["", "", "", "salt"])),
            arrival_time=float(i),
            max_tokens=max_tokens,
            min_tokens=0 if max_tokens is None else draw(st.integers(0, max_tokens)),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=draw(st.sampled_from([None, [5]])),
            skip_reading_prefix_cache=draw(st.sampled_from([None, None, True])),
            bad_word_ids=draw(st.sampled_from([None, None, [[1]]])),
        )
        aborts = draw(st.one_of(st.none(), st.none(), st.integers(0, 40)))
        clients.append(Client(request, draw(st.integers(0, 8)), aborts))
    windows = draw(st.sampled_from(MODELS))
    return Scenario(
        windows=windows,
        page_size=draw(st.integers(1, 4)) * tokens_of_whole_entries(windows),
        spare_pages=draw(st.sampled_from([0, 1, 2, 4, 200])),
        caching=draw(st.sampled_from([True, True, True, False])),
        config=SchedulerConfig(
            max_num_batched_tokens=budget,
            max_num_seqs=min(budget, draw(st.integers(1, 6))),
            policy=draw(st.sampled_from(["fcfs", "priority"])),
            max_decode_steps=draw(st.sampled_from([1, 2, 3, 8])),
        ),
        run_ahead=draw(st.integers(0, 2)),
        clients=tuple(clients),
        timing_seed=draw(st.integers(0, 99)),
    )


@settings(
    max_examples=600,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(scenarios())
def test_tokens_equal_one_request_at_a_time(scenario: Scenario) -> None:
    simulation = Simulation(scenario)
    simulation.run()
    stats = simulation.scheduler.stats()
    event(f"preemptions: {min(stats.num_preemptions, 3)}")
    event(f"prefix hits: {stats.prefix_hits > 0}")
    event(f"plans of several steps: {min(simulation.num_long_plans, 3)}")


@pytest.mark.parametrize("windows", [(None, 5), ("state", None)])
def test_simulation_reaches_the_hard_cases(windows: tuple[Window, ...]) -> None:
    """The property above is worth something only if its machinery preempts, hits and aborts."""
    for policy in ("fcfs", "priority"):
        for run_ahead in (0, 1, 2):
            config = SchedulerConfig(max_num_batched_tokens=9, max_num_seqs=4, policy=policy)
            clients = tuple(_crowd())
            scenario = Scenario(windows, 2, 2, True, config, run_ahead, clients, timing_seed=0)
            simulation = Simulation(scenario)
            simulation.run()
            stats = simulation.scheduler.stats()
            assert stats.num_preemptions > 0
            assert stats.prefix_hits > 0
            assert clients[2].request.finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("windows", [(None, 5), ("state", None)])
def test_simulation_reaches_the_hard_cases_of_several_steps(windows: tuple[Window, ...]) -> None:
    """Plans of several steps beside preemptions, and stops in their middle."""
    for run_ahead in (0, 1, 2):
        config = SchedulerConfig(max_num_batched_tokens=9, max_num_seqs=4, max_decode_steps=4)
        clients = tuple(_crowd())
        scenario = Scenario(windows, 2, 4, True, config, run_ahead, clients, timing_seed=0)
        simulation = Simulation(scenario)
        simulation.run()
        assert simulation.scheduler.stats().num_preemptions > 0
        assert simulation.num_long_plans >= 3
        stops = [naive_tokens(windows, [3, i], 20)[9] for i in range(9)]
        clients = tuple(
            Client(make_request(str(i), [3, i], max_tokens=20, stop_token_ids=[stop]), i, None)
            for i, stop in enumerate(stops)
        )
        scenario = Scenario(windows, 2, 99, True, config, run_ahead, clients, timing_seed=0)
        simulation = Simulation(scenario)
        simulation.run()
        assert simulation.num_cut_plans > 0


def _crowd() -> Iterator[Client]:
    prompt = [1, 2, 3, 0, 2, 1, 1, 3, 2, 2]
    for i in range(5):
        request = make_request(
            str(i), [*prompt, i], max_tokens=14, ignore_eos=True, arrival_time=float(i)
        )
        yield Client(request, arrives=i, aborts=12 if i == 2 else None)


class Simulation:
    """The engine's loop around a scheduler and a fake device, with every step checked."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.kv = _build_kv(scenario)
        self.scheduler = Scheduler(scenario.config, self.kv, MAX_MODEL_LEN)
        self.fresh = [record_allocations(group.pool) for group in self.kv._groups]
        self.device = FakeDevice(make_groups(scenario.windows, scenario.page_size))
        self.num_long_plans = 0  # of several steps
        self.num_cut_plans = 0  # of those, in which a request ended before its last token

    def run(self) -> None:
        scenario, scheduler = self.scenario, self.scheduler
        timing = random.Random(scenario.timing_seed)
        in_flight: deque = deque()
        streams: dict[str, list[int]] = {c.request.request_id: [] for c in scenario.clients}
        last_event = max(max(c.arrives, c.aborts or 0) for c in scenario.clients)
        for step in range(MAX_STEPS):
            self._arrive_and_abort(step)
            sealed = self._sealed_pages()
            plan = scheduler.schedule()
            if plan is not None:
                self._check_plan(plan, sealed)
                in_flight.append((plan, self.device.dispatch(plan)))
            elif not in_flight:
                assert not scheduler.has_unfinished, "requests wait, but nothing will ever run"
            while in_flight and (
                len(in_flight) > scenario.run_ahead or plan is None or timing.random() < 0.2
            ):
                collected, result = in_flight.popleft()
                self._update(collected, result, streams)
                if plan is None:
                    break
            scheduler.check_integrity()
            if not (in_flight or scheduler.has_unfinished) and step > last_event:
                break
        else:
            raise AssertionError("the requests never finish")
        self._check_outputs(streams)
        assert scheduler.is_idle
        assert self.kv.num_pages_used == 0

    def _update(self, plan: StepPlan, result: StepResult, streams: dict[str, list[int]]) -> None:
        is_long = plan.num_steps > 1
        self.num_long_plans += is_long
        for update in self.scheduler.update(plan, result):
            streams[update.request.request_id] += update.new_token_ids
            self.num_cut_plans += is_long and 0 < len(update.new_token_ids) < plan.num_steps

    def _arrive_and_abort(self, step: int) -> None:
        for client in self.scenario.clients:
            if client.arrives == step:
                self.scheduler.add(client.request)
            if client.aborts == step:
                self.scheduler.abort([client.request.request_id])

    def _sealed_pages(self) -> list[set[int]]:
        """Per group, the pages that can be found now: nobody may write them before they are evicted
        and allocated anew."""
        for fresh in self.fresh:
            fresh.clear()
        return [group.cache.pages for group in self.kv._groups]

    def _check_plan(self, plan: StepPlan, sealed: list[set[int]]) -> None:
        config, page_size = self.scenario.config, self.scenario.page_size
        assert plan.num_tokens == sum(entry.num_tokens for entry in plan.scheduled)
        assert 0 < plan.tokens_per_step <= config.max_num_batched_tokens
        assert 1 <= plan.num_steps <= (config.max_decode_steps or 1)
        if plan.num_steps > 1:
            for entry in plan.scheduled:
                sampling, num_prompt = entry.request.sampling, entry.request.num_prompt_tokens
                assert entry.num_tokens == plan.num_steps
                assert entry.samples and not entry.is_admitted and not sampling.bad_word_ids
                newest = entry.start + plan.num_steps  # the position of the last token sampled
                assert newest < MAX_MODEL_LEN
                assert sampling.max_tokens is None or newest < num_prompt + sampling.max_tokens
                first, min_tokens = entry.start + 1 - num_prompt, sampling.min_tokens
                assert not first < min_tokens < newest + 1 - num_prompt, "a ban ends in a plan"
        rows = [entry.row for entry in plan.scheduled]
        assert len(set(rows)) == len(rows) <= config.max_num_seqs
        for index, group in enumerate(self.kv._groups):
            written: set[int] = set()
            for entry in plan.scheduled:
                end = entry.start + entry.num_tokens
                table = entry.page_tables[index]
                pages = set(table[entry.start // page_size : -(-end // page_size)])
                if group.is_state:  # only where a step ends
                    pages -= {NULL_PAGE}
                    assert table[-1] != NULL_PAGE
                assert not pages & written, "two requests write one page"
                written |= pages
            assert not (written & sealed[index]) - self.fresh[index], "a full page is written"
            for page in written - group.cache.pages:
                # Full pages may be shared in the very step that writes them; others never.
                assert group.pool.num_refs(page) == 1, "a shared page is written"

    def _check_outputs(self, streams: dict[str, list[int]]) -> None:
        for client in self.scenario.clients:
            request = client.request
            assert request.is_finished
            assert request.finish_reason is not None
            expected, reason, stop_reason = _expected(self.scenario.windows, request)
            if request.finish_reason is FinishReason.ABORT:
                expected = expected[: request.num_output_tokens]
            else:
                assert (request.finish_reason, request.stop_reason) == (reason, stop_reason)
            assert request.output_token_ids == expected
            assert streams[request.request_id] == expected


def _build_kv(scenario: Scenario) -> KVManager:
    """Pools in which the longest request just fits, plus the spare pages."""
    groups = make_groups(scenario.windows, scenario.page_size)
    budget = scenario.config.max_num_batched_tokens
    num_needed = max(group.max_pages(MAX_MODEL_LEN - 1, budget) for group in groups)
    kv = make_kv(
        scenario.windows,
        page_size=scenario.page_size,
        num_pages=1 + num_needed + scenario.spare_pages,
        caching=scenario.caching,
    )
    assert kv.max_request_tokens(budget) >= MAX_MODEL_LEN - 1
    return kv


def _expected(
    windows: tuple[Window, ...], request: Request
) -> tuple[list[int], FinishReason, int | None]:
    sampling = request.sampling
    num_prompt = request.num_prompt_tokens
    room = MAX_MODEL_LEN - num_prompt
    limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    tokens = naive_tokens(windows, request.prompt_token_ids, limit)
    for i, token in enumerate(tokens):
        if i + 1 < sampling.min_tokens:
            continue
        if token == EOS and not sampling.ignore_eos:
            return tokens[: i + 1], FinishReason.STOP, None
        if token in (sampling.stop_token_ids or ()):
            return tokens[: i + 1], FinishReason.STOP, token
    return tokens, FinishReason.LENGTH, None
