"""Host time of the scheduler, without a device: `python benchmarks/host_overhead.py`.

A decode step of S requests is planned and updated; each request fills a page every 16 steps, so
allocation and page hashing are included at their true rate. Also the time to hash, match and admit
long prompts. Medians, and the 99th percentile for steps.
"""

import statistics
import time

from jengine.config import SchedulerConfig
from jengine.core.kv_manager import KVManager
from jengine.core.plan import StepPlan, StepResult
from jengine.core.scheduler import Scheduler
from jengine.kv_spec import KVKind, KVSpec, build_groups
from jengine.request import Request, SamplingParams

PAGE_SIZE = 16
PROMPT_TOKENS = 512
NUM_STEPS = 400
FULL = KVSpec(KVKind.FULL, (2, 8, 128), "bfloat16", 2)
WINDOW = KVSpec(KVKind.SLIDING_WINDOW, (2, 8, 128), "bfloat16", 2, window=256)


def main() -> None:
    print(f"decode step, microseconds (median / p99 of {NUM_STEPS}; run-ahead of one step)")
    print(f"{'groups':>16} {'requests':>9} {'schedule':>16} {'update':>16} {'us/request':>11}")
    for name, specs in (("full", [FULL]), ("full + window", [FULL, WINDOW])):
        for num_requests in (1, 64, 256):
            schedule, update = time_decode(specs, num_requests)
            total = statistics.median(schedule) + statistics.median(update)
            print(
                f"{name:>16} {num_requests:>9} {_summary(schedule):>16} {_summary(update):>16} "
                f"{total / num_requests:>11.2f}"
            )
    print("admission of one prompt, microseconds (median of 20)")
    for num_tokens in (512, 8192, 131072):
        cold, warm = time_admission(num_tokens)
        print(f"{num_tokens:>9} tokens: cold {cold:>9.0f}   prefix hit {warm:>9.0f}")


def time_decode(specs: list[KVSpec], num_requests: int) -> tuple[list[float], list[float]]:
    scheduler = _scheduler(specs, num_requests, num_pages=num_requests * 80 + 1)
    for i in range(num_requests):
        prompt = [i * PROMPT_TOKENS + j for j in range(PROMPT_TOKENS)]
        sampling = SamplingParams(max_tokens=NUM_STEPS + 100, ignore_eos=True)
        scheduler.add(Request(str(i), prompt, sampling))
    in_flight = _schedule(scheduler)
    while scheduler.num_waiting or in_flight.num_tokens != num_requests:
        scheduler.update(in_flight, _result(in_flight))
        in_flight = _schedule(scheduler)
    schedule, update = [], []
    for _ in range(NUM_STEPS):
        started = time.perf_counter()
        plan = _schedule(scheduler)
        planned = time.perf_counter()
        result = _result(in_flight)
        arrived = time.perf_counter()
        scheduler.update(in_flight, result)
        update.append((time.perf_counter() - arrived) * 1e6)
        schedule.append((planned - started) * 1e6)
        in_flight = plan
    return schedule, update


def time_admission(num_tokens: int) -> tuple[float, float]:
    """Seconds from `add` to the first plan: of a new prompt, and of one whose pages are cached."""
    cold, warm = [], []
    for i in range(20):
        scheduler = _scheduler([FULL], 8, num_pages=num_tokens // PAGE_SIZE + 16)
        prompt = [i + j for j in range(num_tokens)]
        for times in (cold, warm):
            request = Request("r", prompt, SamplingParams(max_tokens=1))
            started = time.perf_counter()
            scheduler.add(request)
            plan = _schedule(scheduler)
            times.append((time.perf_counter() - started) * 1e6)
            while not request.is_finished:
                scheduler.update(plan, _result(plan))
                plan = scheduler.schedule() or plan
    return statistics.median(cold), statistics.median(warm)


def _scheduler(specs: list[KVSpec], num_requests: int, num_pages: int) -> Scheduler:
    groups = build_groups(specs, PAGE_SIZE)
    kv = KVManager(groups, [num_pages] * len(groups), enable_prefix_caching=True)
    config = SchedulerConfig(max_num_seqs=num_requests, max_num_batched_tokens=8192)
    return Scheduler(config, kv, max_model_len=1 << 20)


def _schedule(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    if plan is None:
        raise RuntimeError("the scheduler has nothing to do")
    return plan


def _result(plan: StepPlan) -> StepResult:
    return StepResult([7 if entry.samples else -1 for entry in plan.scheduled])


def _summary(times: list[float]) -> str:
    return f"{statistics.median(times):.0f} / {statistics.quantiles(times, n=100)[98]:.0f}"


if __name__ == "__main__":
    main()
