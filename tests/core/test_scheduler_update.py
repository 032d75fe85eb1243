"""What results, stops and aborts do to requests. Worked out by hand; pages hold 4 tokens."""

from collections.abc import Sequence
from typing import Any

import pytest

from jengine.core.page_pool import IntegrityError
from jengine.core.plan import StepPlan, TokenLogprobs
from jengine.request import FinishReason, Request, RequestStatus
from tests.core.driver import add, deliver, make_scheduler, plan_of, shape
from tests.core.factories import EOS, make_request


class TestPendingTokens:
    def test_nothing_is_planned_past_the_limits(self) -> None:
        scheduler = make_scheduler(max_model_len=8)
        by_tokens = add(scheduler, "a", 2, max_tokens=2)
        by_length = add(scheduler, "b", 6, max_tokens=None)
        plans = [plan_of(scheduler), plan_of(scheduler)]
        assert shape(plans[1]) == [("a", 2, 1, True), ("b", 6, 1, True)]
        assert scheduler.schedule() is None
        deliver(scheduler, plans[0])
        deliver(scheduler, plans[1])
        for request in (by_tokens, by_length):
            assert request.finish_reason is FinishReason.LENGTH
            assert request.output_token_ids == [7, 7]
        assert scheduler.is_idle

    def test_step_planned_before_a_stop_was_known_is_ignored(self) -> None:
        scheduler = make_scheduler()
        request = add(scheduler, "a", 4)
        first, second = plan_of(scheduler), plan_of(scheduler)
        (update,) = deliver(scheduler, first, token=EOS)
        assert update.new_token_ids == [EOS]
        assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, None)
        assert scheduler.stats().num_pages_used == 0
        assert not scheduler.has_unfinished
        assert not scheduler.is_idle
        assert deliver(scheduler, second) == []
        assert request.output_token_ids == [EOS]
        assert scheduler.is_idle

    def test_request_that_needs_its_tokens_on_the_host_waits_for_them(self) -> None:
        scheduler = make_scheduler()
        add(scheduler, "a", 2, bad_word_ids=[[3]])
        add(scheduler, "b", 2)
        first = plan_of(scheduler)
        assert len(first.scheduled) == 2
        second = plan_of(scheduler)
        assert shape(second) == [("b", 2, 1, True)]
        deliver(scheduler, first)
        assert shape(plan_of(scheduler)) == [("a", 2, 1, True), ("b", 3, 1, True)]

    def test_results_come_in_the_order_of_their_steps(self) -> None:
        scheduler = make_scheduler()
        add(scheduler, "a", 2)
        plan_of(scheduler)
        with pytest.raises(IntegrityError, match="step 1 is not step 0"):
            deliver(scheduler, plan_of(scheduler))


class TestStop:
    def run(self, tokens: Sequence[int], **sampling: Any) -> Request:
        scheduler = make_scheduler()
        request = add(scheduler, "a", 3, **sampling)
        for token in tokens:
            assert not request.is_finished
            deliver(scheduler, plan_of(scheduler), token)
        return request

    def test_eos(self) -> None:
        request = self.run([5, EOS])
        assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, None)
        assert request.output_token_ids == [5, EOS]
        assert request.arrival_time is not None
        assert None not in (request.scheduled_time, request.first_token_time, request.finish_time)

    def test_ignored_eos(self) -> None:
        request = self.run([EOS, EOS], ignore_eos=True, max_tokens=2)
        assert request.finish_reason is FinishReason.LENGTH

    def test_stop_token(self) -> None:
        request = self.run([5, 9], stop_token_ids=[8, 9], ignore_eos=True)
        assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, 9)

    def test_no_stop_before_min_tokens(self) -> None:
        request = self.run([EOS, 9, EOS], stop_token_ids=[9], min_tokens=3)
        assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, None)

    def test_stop_wins_over_length(self) -> None:
        assert self.run([5, EOS], max_tokens=2).finish_reason is FinishReason.STOP

    def test_max_model_len(self) -> None:
        assert self.run([5] * 61, max_tokens=None).finish_reason is FinishReason.LENGTH


class TestAbort:
    def test_waiting_running_in_flight_and_unknown(self) -> None:
        scheduler = make_scheduler(max_num_seqs=2)
        requests = [add(scheduler, name, 5) for name in "abc"]
        plan = plan_of(scheduler)
        assert scheduler.abort(["c", "a", "nobody", "a"]) == [requests[2], requests[0]]
        scheduler.check_integrity()
        assert {r.finish_reason for r in (requests[0], requests[2])} == {FinishReason.ABORT}
        assert scheduler.stats().num_pages_used == 2
        (update,) = deliver(scheduler, plan)
        assert update.request is requests[1]
        assert scheduler.abort(["b"], FinishReason.STOP) == [requests[1]]
        assert requests[1].finish_reason is FinishReason.STOP
        assert scheduler.is_idle
        assert scheduler.stats().num_pages_used == 0

    def test_preempted(self) -> None:
        scheduler = make_scheduler(num_pages=5)
        add(scheduler, "a", 7, max_tokens=4)
        b = add(scheduler, "b", 7, max_tokens=4)
        plans = [plan_of(scheduler) for _ in range(3)]
        assert b.status is RequestStatus.PREEMPTED
        scheduler.abort(["b"])
        for plan in plans:
            deliver(scheduler, plan)
        assert b.output_token_ids == []
        assert scheduler.num_waiting == 0

    def test_id_may_be_used_again_while_the_old_step_is_in_flight(self) -> None:
        scheduler = make_scheduler()
        old = add(scheduler, "a", 3)
        first = plan_of(scheduler)
        scheduler.abort(["a"])
        new = add(scheduler, "a", 3)
        second = plan_of(scheduler)
        assert deliver(scheduler, first, token=5) == []
        deliver(scheduler, second, token=6)
        assert (old.output_token_ids, new.output_token_ids) == ([], [6])


class TestResults:
    def test_failed_request_ends_alone_and_its_pages_are_not_found_again(self) -> None:
        scheduler = make_scheduler(max_num_batched_tokens=32)
        bad = make_request("a", range(9))
        scheduler.add(bad)
        good = add(scheduler, "b", 9)
        updates = deliver(scheduler, plan_of(scheduler), failed=frozenset({0}))
        assert [(u.request, u.new_token_ids) for u in updates] == [(bad, []), (good, [7])]
        assert (bad.finish_reason, good.finish_reason) == (FinishReason.ERROR, None)
        twin = make_request("c", range(9))
        scheduler.add(twin)
        plan_of(scheduler)
        assert twin.num_cached_tokens == 0

    def test_logprobs_go_with_their_request(self) -> None:
        scheduler = make_scheduler()
        add(scheduler, "a", 3, logprobs=1)
        add(scheduler, "b", 3)
        logprobs = TokenLogprobs([7], [-0.5], 1)
        updates = deliver(scheduler, plan_of(scheduler), logprobs=[logprobs, None])
        assert [u.logprobs for u in updates] == [[logprobs], None]

    def test_prompt_logprobs_are_passed_on_once_each_despite_preemption(self) -> None:
        scheduler = make_scheduler(num_pages=8, max_num_batched_tokens=8)  # 7 pages
        add(scheduler, "a", 7, max_tokens=8)
        b = add(scheduler, "b", 18, max_tokens=2, prompt_logprobs=0)  # 5 pages
        positions: list[int] = []

        def step() -> StepPlan:
            plan = plan_of(scheduler)
            chunks = [
                [
                    TokenLogprobs([position], [0.0], 1)
                    for position in range(e.start + 1, min(e.start + e.num_tokens, 17) + 1)
                ]
                if e.request is b
                else None
                for e in plan.scheduled
            ]
            for update in deliver(scheduler, plan, prompt_logprobs=chunks):
                positions.extend(p.token_ids[0] for p in update.prompt_logprobs or ())
            return plan

        while not b.is_finished:
            step()
        assert b.num_preemptions > 0
        assert positions == list(range(1, 18))

    def test_prompt_chunks_bring_no_update(self) -> None:
        scheduler = make_scheduler(max_num_batched_tokens=4)
        request = add(scheduler, "a", 7)
        assert deliver(scheduler, plan_of(scheduler)) == []
        assert request.first_token_time is None
        assert len(deliver(scheduler, plan_of(scheduler))) == 1
        stats = scheduler.stats()
        assert (stats.num_prompt_tokens, stats.num_generation_tokens, stats.num_steps) == (7, 1, 2)
