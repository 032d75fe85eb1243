"""One world on a virtual clock: the engine's schedulers, page managers and buckets, and in the
place of a device the seconds that a step would take.
"""

import collections
import dataclasses
import random
from collections.abc import Iterator, Sequence

from benchmarks.simulate.cost import MAX_MODEL_LEN, Work, World
from jengine.config import CacheConfig, CompileConfig, SchedulerConfig
from jengine.core.data_ranks import RankSchedulers
from jengine.core.kv_manager import KVManager
from jengine.core.plan import StepPlan, StepResult
from jengine.core.scheduler import Scheduler
from jengine.request import Request, SamplingParams
from jengine.runtime.buckets import build_buckets, pick_bucket
from jengine.runtime.memory import plan_pages

UTILISATION, WORKSPACE = 0.92, 4e9  # of a GPU's memory; a step's own arrays and the reserve
MAX_IN_FLIGHT = 2  # steps, as the engine dispatches them
MAX_NUM_SEQS = 256


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Requests of one world: Poisson arrivals, lengths from log-normal distributions."""

    requests_per_second: float
    prompt_median: int = 1500
    prompt_sigma: float = 0.8
    answer_median: int = 300
    answer_sigma: float = 0.7

    def arrivals(self, seconds: float, seed: int) -> Iterator[tuple[float, int, int]]:
        """(time, tokens of the prompt, tokens of the answer)."""
        rng, now = random.Random(seed), 0.0
        while (now := now + rng.expovariate(self.requests_per_second)) < seconds:
            prompt = rng.lognormvariate(0, self.prompt_sigma) * self.prompt_median
            answer = rng.lognormvariate(0, self.answer_sigma) * self.answer_median
            room = MAX_MODEL_LEN // 2
            yield now, min(room, 1 + int(prompt)), min(room, 2 + int(answer))


@dataclasses.dataclass
class Outcome:
    """Seconds, of requests that arrived after the warm-up; counts are of the time after it."""

    first_token: list[float]
    per_token: list[float]  # mean of each request after its first
    step_seconds: list[float]
    num_tokens: int  # sampled
    seconds: float
    running: list[int]  # of all ranks, at each step
    num_waiting: int  # at the end
    num_preemptions: int


def kv_pages(world: World, token_budget: int) -> tuple[int, ...]:
    """Of each rank. Raises `ValueError` if the weights leave no room for one request."""
    free = world.gpu.memory * UTILISATION - WORKSPACE
    free -= world.model.weight_bytes(world.num_ranks, num_redundant=32)
    return plan_pages(
        world.model.groups,
        CacheConfig(),
        free_bytes=int(free),
        is_planned=True,
        max_model_len=MAX_MODEL_LEN,
        max_chunk=token_budget,
        max_num_seqs=MAX_NUM_SEQS,
    )


class Simulation:
    """Runs a world, whose steps hold `token_budget` tokens of each rank, until the traffic's time
    is over.
    """

    def __init__(self, world: World, token_budget: int, traffic: Traffic, seconds: float) -> None:
        self._world, self._seconds, self._warm_up = world, seconds, seconds / 4
        groups, pages = world.model.groups, kv_pages(world, token_budget)
        config = SchedulerConfig(MAX_NUM_SEQS, token_budget)
        managers = [
            KVManager(groups, pages, enable_prefix_caching=False) for _ in range(world.num_ranks)
        ]
        self._schedulers = RankSchedulers(
            [Scheduler(config, manager, MAX_MODEL_LEN) for manager in managers]
        )
        self._buckets = build_buckets(CompileConfig(), config, growth=2)
        self._arrivals = collections.deque(traffic.arrivals(seconds, seed=1))
        self._arrived: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._outcome = Outcome([], [], [], 0, seconds - self._warm_up, [], 0, 0)

    def run(self) -> Outcome:
        """The engine's loop: plan and dispatch ahead, then read the oldest step."""
        now = device_free = 0.0
        in_flight: collections.deque[tuple[float, list[StepPlan | None]]] = collections.deque()
        while now < self._seconds:
            self._admit(now)
            plans = self._schedulers.schedule() if len(in_flight) < MAX_IN_FLIGHT else None
            if plans is not None:
                seconds = self._step_seconds(plans)
                device_free = max(device_free, now) + seconds
                in_flight.append((device_free, plans))
                if now > self._warm_up:
                    self._outcome.step_seconds.append(seconds)
                    self._outcome.running.append(self._schedulers.num_running)
            if in_flight and (plans is None or len(in_flight) == MAX_IN_FLIGHT):
                now, plans = in_flight.popleft()
                self._collect(now, plans)
            elif plans is None:
                now = self._arrivals[0][0] if self._arrivals else self._seconds
        self._outcome.num_waiting = self._schedulers.num_waiting
        self._outcome.num_preemptions = self._schedulers.stats().num_preemptions
        return self._outcome

    def _admit(self, now: float) -> None:
        while self._arrivals and self._arrivals[0][0] <= now:
            arrival, prompt, answer = self._arrivals.popleft()
            name = str(len(self._arrived))
            params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
            self._schedulers.add(Request(name, [7] * prompt, params))
            self._arrived[name] = arrival

    def _step_seconds(self, plans: Sequence[StepPlan | None]) -> float:
        real = [plan for plan in plans if plan is not None]
        num_tokens = max(plan.num_tokens for plan in real)
        num_seqs = max(len(plan.scheduled) for plan in real)
        is_decode = all(plan.num_tokens == len(plan.scheduled) for plan in real)
        buckets = [b for b in self._buckets if is_decode or not b.is_decode]
        work = [
            Work(plan.num_tokens, [(i.num_tokens, i.start + i.num_tokens) for i in plan.scheduled])
            for plan in real
        ]
        bucket = pick_bucket(buckets, num_tokens, num_seqs)
        return self._world.seconds(work, bucket.num_tokens)

    def _collect(self, now: float, plans: list[StepPlan | None]) -> None:
        results = [None if p is None else StepResult([[11]] * len(p.scheduled)) for p in plans]
        for update in self._schedulers.update(plans, results):
            request, name = update.request, update.request.request_id
            self._outcome.num_tokens += len(update.new_token_ids) * (now > self._warm_up)
            self._first.setdefault(name, now)
            is_counted = self._arrived[name] > self._warm_up
            if request.finish_reason is not None and is_counted:
                self._outcome.first_token.append(self._first[name] - self._arrived[name])
                num_more = request.num_output_tokens - 1
                self._outcome.per_token.append((now - self._first[name]) / num_more)
