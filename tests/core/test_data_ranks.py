"""Several schedulers behind one face: who gets a request, what a step holds, what is reported."""

import pytest

from jengine.core.data_ranks import RankSchedulers
from jengine.core.plan import StepPlan, StepResult
from jengine.errors import DuplicateRequestError
from jengine.request import FinishReason
from tests.core.driver import make_scheduler, shape
from tests.core.factories import make_request


def results(plans: list[StepPlan | None]) -> list[StepResult | None]:
    return [None if p is None else StepResult([[7] for _ in p.scheduled]) for p in plans]


def make_ranks(num: int = 2) -> RankSchedulers:
    return RankSchedulers([make_scheduler(max_num_waiting=8) for _ in range(num)])


def test_requests_go_where_fewest_are_and_stay() -> None:
    ranks = make_ranks()
    for i in range(5):
        ranks.add(make_request(f"r{i}", range(100 * i, 100 * i + 3), max_tokens=2))
    plans = ranks.schedule()
    assert plans is not None
    assert [shape(plan) for plan in plans if plan is not None] == [
        [("r0", 0, 3, True), ("r2", 0, 3, True), ("r4", 0, 3, True)],
        [("r1", 0, 3, True), ("r3", 0, 3, True)],
    ]
    updates = ranks.update(plans, results(plans))
    assert [u.request.request_id for u in updates] == ["r0", "r2", "r4", "r1", "r3"]
    plans = ranks.schedule()
    assert plans is not None
    assert all(u.request.is_finished for u in ranks.update(plans, results(plans)))
    assert ranks.is_idle and not ranks.has_unfinished
    ranks.check_integrity()


def test_a_rank_without_work_has_no_plan() -> None:
    ranks = make_ranks()
    ranks.add(make_request("a", range(3), max_tokens=2))
    plans = ranks.schedule()
    assert plans is not None and plans[1] is None
    assert len(ranks.update(plans, results(plans))) == 1
    ranks.add(make_request("b", range(3), max_tokens=2))
    plans = ranks.schedule()
    assert plans is not None
    assert [shape(plan) for plan in plans if plan is not None] == [
        [("a", 3, 1, True)],
        [("b", 0, 3, True)],
    ]
    ahead = ranks.schedule()  # of what is still on the device
    assert ahead is not None and ahead[0] is None and ahead[1] is not None
    assert ranks.schedule() is None
    for each in (plans, ahead):
        ranks.update(each, results(each))
    assert ranks.is_idle


def test_ids_are_unique_over_all_ranks_and_aborts_reach_any() -> None:
    ranks = make_ranks()
    for name in ("a", "b"):
        ranks.add(make_request(name, range(3)))
    with pytest.raises(DuplicateRequestError, match="'b'"):
        ranks.add(make_request("b", range(3)))
    (aborted,) = ranks.abort(iter(["b", "nobody"]), FinishReason.ABORT)
    assert aborted.request_id == "b"
    stats = ranks.stats()
    assert (stats.num_waiting, stats.num_pages_total, stats.page_size) == (1, 128, 4)
    assert ranks.schedule() is not None
    assert (ranks.num_running, ranks.num_waiting, ranks.stats().num_steps) == (1, 0, 1)
    assert ranks.stats().num_pages_used > 0
    assert not ranks.reset_prefix_cache()
