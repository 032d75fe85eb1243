"""Who gets tokens, pages and rows. Worked out by hand; pages hold 4 tokens."""

import pytest

from jengine.core.page_pool import IntegrityError
from jengine.errors import DuplicateRequestError, InvalidRequestError, QueueFullError
from jengine.request import FinishReason, RequestStatus
from tests.core.driver import add, deliver, make_scheduler, plan_of, shape
from tests.core.factories import make_request


class TestBudget:
    def test_long_prompt_takes_what_is_left_and_goes_on(self) -> None:
        scheduler = make_scheduler()
        add(scheduler, "a", 6)
        add(scheduler, "b", 23)
        add(scheduler, "c", 3)
        assert shape(plan_of(scheduler)) == [("a", 0, 6, True), ("b", 0, 10, False)]
        # "a" runs ahead with its pending token; "b" ends its prompt; 2 tokens are left for "c".
        assert shape(plan_of(scheduler)) == [
            ("a", 6, 1, True), ("b", 10, 13, True), ("c", 0, 2, False),
        ]  # fmt: skip
        assert shape(plan_of(scheduler)) == [
            ("a", 7, 1, True), ("b", 23, 1, True), ("c", 2, 1, True),
        ]  # fmt: skip
        assert scheduler.stats().scheduled_tokens == 3

    def test_prompt_leaves_a_token_for_each_request_behind_it(self) -> None:
        scheduler = make_scheduler(policy="priority", max_num_seqs=3)
        add(scheduler, "low", 4, priority=5)
        add(scheduler, "mid", 4, priority=4)
        plan_of(scheduler)
        add(scheduler, "high", 40, priority=0)
        # Decodes first, then the admission; afterwards "high" is in front of both.
        assert shape(plan_of(scheduler))[-1] == ("high", 0, 14, False)
        assert shape(plan_of(scheduler)) == [
            ("high", 14, 14, False), ("mid", 5, 1, True), ("low", 5, 1, True),
        ]  # fmt: skip

    def test_rows_are_bounded_and_reused(self) -> None:
        scheduler = make_scheduler(max_num_seqs=2)
        first = add(scheduler, "a", 2, max_tokens=1)
        for name in ("b", "c"):
            add(scheduler, name, 2)
        plan = plan_of(scheduler)
        assert [(e.row, e.is_admitted) for e in plan.scheduled] == [(0, True), (1, True)]
        deliver(scheduler, plan)
        assert (first.finish_reason, first.row) == (FinishReason.LENGTH, -1)
        plan = plan_of(scheduler)
        assert [(e.request.request_id, e.row, e.is_admitted) for e in plan.scheduled] == [
            ("b", 1, False),
            ("c", 0, True),
        ]

    def test_budget_must_hold_a_token_of_each_request(self) -> None:
        with pytest.raises(ValueError, match="max_num_batched_tokens"):
            make_scheduler(max_num_seqs=8, max_num_batched_tokens=4)


class TestAdmission:
    def test_head_waits_until_its_whole_prompt_fits_and_nobody_overtakes(self) -> None:
        scheduler = make_scheduler(num_pages=9)  # 8 pages
        a = add(scheduler, "a", 16, max_tokens=2)  # 4 pages, then a fifth
        add(scheduler, "b", 20, max_tokens=8)  # 5 pages
        add(scheduler, "c", 2)
        first = plan_of(scheduler)
        second = plan_of(scheduler)
        assert [shape(first), shape(second)] == [[("a", 0, 16, True)], [("a", 16, 1, True)]]
        assert scheduler.schedule() is None  # "a" ends with what is in flight
        deliver(scheduler, first)
        deliver(scheduler, second)
        assert a.is_finished
        assert shape(plan_of(scheduler)) == [("b", 0, 16, False)]

    def test_twin_in_the_same_step_shares_pages(self) -> None:
        scheduler = make_scheduler(max_num_batched_tokens=32)
        a, b = (make_request(name, range(10)) for name in "ab")
        scheduler.add(a)
        scheduler.add(b)
        plan = plan_of(scheduler)
        assert shape(plan) == [("a", 0, 10, True), ("b", 8, 2, True)]
        assert [e.page_tables[0] for e in plan.scheduled] == [[1, 2, 3], [1, 2, 4]]
        assert (a.num_cached_tokens, b.num_cached_tokens) == (0, 8)
        stats = scheduler.stats()
        assert (stats.prefix_queries, stats.prefix_hits) == (20, 8)
        assert (stats.num_pages_used, stats.num_pages_total) == (4, 64)

    def test_flood_of_long_prompts_preempts_nobody(self) -> None:
        scheduler = make_scheduler(num_pages=17, max_num_batched_tokens=8)
        for i in range(12):
            add(scheduler, f"{i}", 30, max_tokens=1)  # 8 of 16 pages each
        for _ in range(100):
            if (plan := scheduler.schedule()) is None:
                break
            deliver(scheduler, plan)
        assert not scheduler.has_unfinished
        assert scheduler.stats().num_preemptions == 0

    def test_nobody_is_admitted_while_a_running_prompt_still_wants_pages(self) -> None:
        scheduler = make_scheduler(policy="priority")
        add(scheduler, "low", 4, priority=1, bad_word_ids=[[3]])
        plan_of(scheduler)
        add(scheduler, "high", 40, priority=0)
        assert shape(plan_of(scheduler)) == [("high", 0, 16, False)]
        add(scheduler, "new", 4, priority=0)
        # The token left for "low", whose last one is on the device, is nobody's.
        assert shape(plan_of(scheduler)) == [("high", 16, 15, False)]

    def test_best_priority_is_admitted_first(self) -> None:
        scheduler = make_scheduler(policy="priority", max_num_seqs=1)
        add(scheduler, "late", 2, priority=0, arrival_time=2.0)
        add(scheduler, "worse", 2, priority=1, arrival_time=0.0)
        add(scheduler, "early", 2, priority=0, arrival_time=1.0)
        assert shape(plan_of(scheduler)) == [("early", 0, 2, True)]


class TestRefusal:
    def test_prompt_that_leaves_no_room_for_output(self) -> None:
        scheduler = make_scheduler(max_model_len=10)
        add(scheduler, "a", 9)
        with pytest.raises(InvalidRequestError, match="takes 10") as error:
            add(scheduler, "b", 10)
        assert error.value.field == "prompt"

    def test_request_that_can_never_fit(self) -> None:
        scheduler = make_scheduler(num_pages=5)  # 16 tokens
        with pytest.raises(InvalidRequestError, match="KV cache holds 16") as error:
            add(scheduler, "a", 17)
        assert error.value.field == "prompt"
        with pytest.raises(InvalidRequestError, match="leave room for 5") as error:
            add(scheduler, "b", 12, max_tokens=6)
        assert error.value.field == "max_tokens"
        add(scheduler, "c", 12, max_tokens=5)  # the fifth token is never computed

    def test_empty_prompt(self) -> None:
        with pytest.raises(InvalidRequestError, match="at least one token"):
            add(make_scheduler(), "a", 0)

    def test_duplicate_id_until_the_first_has_finished(self) -> None:
        scheduler = make_scheduler()
        add(scheduler, "a", 2)
        with pytest.raises(DuplicateRequestError, match="'a'"):
            add(scheduler, "a", 2)
        scheduler.abort(["a"])
        add(scheduler, "a", 2)

    def test_full_queue(self) -> None:
        scheduler = make_scheduler(max_num_waiting=2)
        add(scheduler, "a", 2)
        add(scheduler, "b", 2)
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            add(scheduler, "c", 2)
        plan_of(scheduler)
        add(scheduler, "c", 2)
        assert scheduler.stats().num_waiting_tokens == 2

    def test_a_bound_of_waiting_tokens(self) -> None:
        scheduler = make_scheduler(max_num_waiting_tokens=10)
        add(scheduler, "long", 14)  # alone it may wait, or it never could
        with pytest.raises(QueueFullError, match="14 prompt tokens are waiting; with 1 more"):
            add(scheduler, "short", 1)
        plan_of(scheduler)
        add(scheduler, "a", 8)
        add(scheduler, "b", 2)
        with pytest.raises(QueueFullError, match="the limit of 10"):
            add(scheduler, "c", 1)


class TestPreemption:
    def test_newest_gives_way_and_keeps_its_tokens(self) -> None:
        scheduler = make_scheduler(num_pages=5)  # 4 pages
        a = add(scheduler, "a", 7, max_tokens=4)
        b = add(scheduler, "b", 7, max_tokens=4)
        in_flight = [
            plan_of(scheduler),
            plan_of(scheduler),
        ]  # both at 8 computed tokens: 2 pages each
        deliver(scheduler, in_flight[0])
        third = plan_of(scheduler)  # "a" needs a third page
        assert shape(third) == [("a", 8, 1, True)]
        assert (b.status, b.row, b.num_computed_tokens) == (RequestStatus.PREEMPTED, -1, 0)
        assert (b.num_output_tokens, b.num_pending_tokens) == (1, 1)
        deliver(scheduler, in_flight[1])
        assert (b.output_token_ids, b.num_pending_tokens) == ([7, 7], 0)
        assert shape(plan_of(scheduler)) == [("a", 9, 1, True)]  # "b" does not fit beside it
        deliver(scheduler, third)
        assert scheduler.abort(["a"]) == [a]
        # 9 tokens: page 0 of "b" has been evicted or not, its first full page is found again.
        fourth = plan_of(scheduler)
        assert shape(fourth) == [("b", 4, 5, True)]
        assert fourth.scheduled[0].is_admitted
        assert b.num_cached_tokens == 0  # of the first admission
        assert (b.num_preemptions, scheduler.stats().num_preemptions) == (1, 1)

    def test_not_admitted_again_before_its_pending_tokens_arrive(self) -> None:
        scheduler = make_scheduler(num_pages=5)
        add(scheduler, "a", 7, max_tokens=4)
        add(scheduler, "b", 7, max_tokens=4)
        first, second, third = plan_of(scheduler), plan_of(scheduler), plan_of(scheduler)
        assert shape(third) == [("a", 8, 1, True)]
        scheduler.abort(["a"])
        assert scheduler.schedule() is None
        for plan in (first, second, third):
            deliver(scheduler, plan)
        assert shape(plan_of(scheduler)) == [("b", 4, 5, True)]

    def test_preempted_request_may_finish_in_the_queue(self) -> None:
        scheduler = make_scheduler(num_pages=5)
        add(scheduler, "a", 7, max_tokens=4)
        b = add(scheduler, "b", 7, max_tokens=2)
        first, second = plan_of(scheduler), plan_of(scheduler)
        third = plan_of(scheduler)
        assert b.status is RequestStatus.PREEMPTED
        deliver(scheduler, first)
        updates = deliver(scheduler, second)
        assert [u.request.finish_reason for u in updates] == [None, FinishReason.LENGTH]
        assert b.output_token_ids == [7, 7]
        assert scheduler.num_waiting == 0
        deliver(scheduler, third)

    def test_worst_priority_gives_way(self) -> None:
        scheduler = make_scheduler(num_pages=5, policy="priority")
        low = add(scheduler, "low", 7, max_tokens=4, priority=1)
        plan_of(scheduler)
        add(scheduler, "high", 7, max_tokens=4, priority=0)
        plan_of(scheduler)
        plan = plan_of(scheduler)  # "low" is older, and wants its third page first
        assert shape(plan) == [("high", 7, 1, True)]
        assert low.status is RequestStatus.PREEMPTED

    def test_several_go_back_to_the_front_in_their_order(self) -> None:
        scheduler = make_scheduler(num_pages=5)
        for name in ("a", "b", "c", "d"):
            add(scheduler, name, 4, max_tokens=8)  # a page each
        assert len(plan_of(scheduler).scheduled) == 4
        add(scheduler, "e", 1)
        # The second page of "a" is taken from "d", that of "b" from "c".
        assert shape(plan_of(scheduler)) == [("a", 4, 1, True), ("b", 4, 1, True)]
        assert [r.request_id for r in scheduler._waiting] == ["c", "d", "e"]


def test_integrity_check_sees_lost_rows_and_requests() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    plan_of(scheduler)
    scheduler._free_rows.pop()
    with pytest.raises(IntegrityError, match="row"):
        scheduler.check_integrity()
    scheduler._running.clear()
    with pytest.raises(IntegrityError, match="neither waits nor runs"):
        scheduler.check_integrity()


def test_prefix_cache_is_reset_only_when_nothing_runs() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    plan_of(scheduler)
    assert not scheduler.reset_prefix_cache()
    scheduler.abort(["a"])
    assert scheduler.reset_prefix_cache()
