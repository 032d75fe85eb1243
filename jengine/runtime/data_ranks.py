"""Steps of several data ranks: each has a plan of its own, all run in one program."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jengine.core.plan import StepPlan, StepResult
from jengine.runtime.buckets import Bucket
from jengine.runtime.runner import ModelRunner, StepHandle

Plans = Sequence[StepPlan | None]  # of each data rank; None: it has nothing to do
NOTHING = StepPlan(step_id=-1, scheduled=(), num_tokens=0)


class AnySteps(Protocol):
    """`ModelRunner`, or `DataRanks`: what takes the plans of either."""

    def dispatch(self, plan: Any) -> Any: ...
    def collect(self, handle: Any) -> Any: ...


def steps_of(runner: ModelRunner) -> AnySteps:
    return runner if runner.num_data_ranks == 1 else DataRanks(runner)


@dataclass(frozen=True, slots=True)
class RanksHandle:
    """A dispatched step of all data ranks, whose results are still on their way."""

    plan: Plans
    bucket: Bucket  # of each rank
    handles: tuple[StepHandle | None, ...]


class DataRanks:
    """Takes the plans of all data ranks where `ModelRunner` takes one."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._placement = runner.blueprint.placement

    def dispatch(self, plan: Plans) -> RanksHandle:
        """Start a step. It has the largest bucket that any rank needs; idle ranks run along with
        empty batches, since the others' experts are theirs.
        """
        plans = [NOTHING if each is None else each for each in plan]
        bucket = self._runner.pick_bucket(plans)
        batches = [self._runner.build(each, bucket, rank) for rank, each in enumerate(plans)]
        output = self._runner.launch(bucket, batches)
        handles: list[StepHandle | None] = []
        for rank, (each, batch) in enumerate(zip(plan, batches, strict=True)):
            own = None if each is None else self._placement.of_data_rank(output, rank)
            if each is None or own is None:
                handles.append(None)
                continue
            own.sampled.copy_to_host_async()
            handles.append(StepHandle(each, bucket, batch, own))
        return RanksHandle(plan, bucket, tuple(handles))

    def collect(self, handle: RanksHandle) -> list[StepResult | None]:
        """Wait for a step and read what each rank's requests asked for."""
        return [None if each is None else self._runner.collect(each) for each in handle.handles]
