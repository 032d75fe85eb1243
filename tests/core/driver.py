"""Drives a scheduler by hand: plans are checked and looked at, results made up."""

from collections.abc import Sequence
from typing import Any

from jengine.config import SchedulerConfig
from jengine.core.plan import RequestUpdate, StepPlan, StepResult
from jengine.core.scheduler import Scheduler
from jengine.request import Request
from tests.core.factories import Window, make_kv, make_request


def make_scheduler(
    *,
    num_pages: int = 65,
    max_model_len: int = 64,
    windows: Sequence[Window] = (None,),
    **config: Any,
) -> Scheduler:
    config = {"max_num_seqs": 4, "max_num_batched_tokens": 16, **config}
    return Scheduler(
        SchedulerConfig(**config), make_kv(windows, num_pages=num_pages), max_model_len
    )


def plan_of(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.check_integrity()
    return plan


def shape(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    """(request, start, tokens, samples) of each entry."""
    return [(e.request.request_id, e.start, e.num_tokens, e.samples) for e in plan.scheduled]


def deliver(
    scheduler: Scheduler, plan: StepPlan, token: int = 7, **result: Any
) -> list[RequestUpdate]:
    failed = result.get("failed", ())
    tokens = [[] if i in failed else [token] * plan.num_steps for i in range(len(plan.scheduled))]
    updates = scheduler.update(plan, StepResult(tokens, **result))
    scheduler.check_integrity()
    return updates


def add(scheduler: Scheduler, request_id: str, num_tokens: int, **kwargs: Any) -> Request:
    """A request whose prompt shares nothing with other requests."""
    base = 1000 * (1 + sum(map(ord, request_id)))
    request = make_request(request_id, range(base, base + num_tokens), **kwargs)
    scheduler.add(request)
    return request
