"""Requests of several data ranks: a scheduler with its own pages for each, one loop for all."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec

from jengine.config import SchedulerConfig
from jengine.core.kv_manager import KVManager
from jengine.core.plan import RequestUpdate, StepPlan, StepResult
from jengine.core.scheduler import Scheduler
from jengine.core.stats import SchedulerStats
from jengine.errors import DuplicateRequestError
from jengine.request import FinishReason, Request


class AnyScheduler(Protocol):
    """What the loop asks of `Scheduler`, or of `RankSchedulers`, whose plans are of all ranks."""

    @property
    def has_unfinished(self) -> bool: ...
    @property
    def is_idle(self) -> bool: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    def stats(self) -> SchedulerStats: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_ids: Iterable[str], reason: FinishReason) -> list[Request]: ...
    def schedule(self) -> Any: ...
    def update(self, plan: Any, result: Any, /) -> list[RequestUpdate]: ...
    def settle(self) -> list[RequestUpdate]: ...
    def reset_prefix_cache(self) -> bool: ...
    def check_integrity(self) -> None: ...


def build_scheduler(
    config: SchedulerConfig, pages: Sequence[KVManager], max_model_len: int
) -> AnyScheduler:
    """`pages`: of each data rank."""
    schedulers = [Scheduler(config, each, max_model_len) for each in pages]
    return schedulers[0] if len(schedulers) == 1 else RankSchedulers(schedulers)


class RankSchedulers:
    """What `Scheduler` is to one rank: the same methods, with a plan for each rank where it has
    one. A request stays on the rank it was given to.
    """

    def __init__(self, ranks: Sequence[Scheduler]) -> None:
        self._ranks = tuple(ranks)
        self._num_steps = 0

    @property
    def has_unfinished(self) -> bool:
        return any(rank.has_unfinished for rank in self._ranks)

    @property
    def is_idle(self) -> bool:
        """No request is left and no step is in flight."""
        return all(rank.is_idle for rank in self._ranks)

    @property
    def num_running(self) -> int:
        return sum(rank.num_running for rank in self._ranks)

    @property
    def num_waiting(self) -> int:
        return sum(rank.num_waiting for rank in self._ranks)

    def stats(self) -> SchedulerStats:
        """Sums over all ranks; a step of all of them is one."""
        stats = [msgspec.structs.asdict(rank.stats()) for rank in self._ranks]
        sums = {name: sum(each[name] for each in stats) for name in stats[0]}
        return SchedulerStats(
            **sums | {"page_size": stats[0]["page_size"], "num_steps": self._num_steps}
        )

    def add(self, request: Request) -> None:
        """To the rank with the fewest requests. Raises what `Scheduler.add` does."""
        if any(rank.has(request.request_id) for rank in self._ranks):
            raise DuplicateRequestError(f"request {request.request_id!r} is already in flight")
        min(self._ranks, key=lambda rank: rank.num_running + rank.num_waiting).add(request)

    def abort(
        self, request_ids: Iterable[str], reason: FinishReason = FinishReason.ABORT
    ) -> list[Request]:
        request_ids = list(request_ids)
        return [r for rank in self._ranks for r in rank.abort(request_ids, reason)]

    def schedule(self) -> list[StepPlan | None] | None:
        """A plan for each rank that can run something; None if no rank can."""
        plans = [rank.schedule() for rank in self._ranks]
        if all(plan is None for plan in plans):
            return None
        self._num_steps += 1
        return plans

    def update(
        self, plans: Sequence[StepPlan | None], results: Sequence[StepResult | None]
    ) -> list[RequestUpdate]:
        updates: list[RequestUpdate] = []
        for rank, plan, result in zip(self._ranks, plans, results, strict=True):
            if plan is not None and result is not None:
                updates += rank.update(plan, result)
        return updates

    def settle(self) -> list[RequestUpdate]:
        return [update for rank in self._ranks for update in rank.settle()]

    def reset_prefix_cache(self) -> bool:
        """Forget cached pages, of ranks without running requests. False if there are others."""
        return all([rank.reset_prefix_cache() for rank in self._ranks])

    def check_integrity(self) -> None:
        for rank in self._ranks:
            rank.check_integrity()
