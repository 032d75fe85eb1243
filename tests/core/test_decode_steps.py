"""Plans of several decode steps. Worked out by hand; pages hold 4 tokens."""

from typing import Any

import pytest

from jengine.core.plan import StepResult
from jengine.core.scheduler import Scheduler
from jengine.request import FinishReason
from tests.core.driver import add, deliver, make_scheduler, plan_of, shape
from tests.core.factories import EOS, make_request


def decoding(*lengths: int, **kwargs: Any) -> Scheduler:
    """A scheduler of up to 8 steps whose requests, "0", "1", ..., have their first token."""
    sampling = {"max_tokens": 30, **kwargs.pop("sampling", {})}
    scheduler = make_scheduler(**{"max_decode_steps": 8, **kwargs})
    for i, length in enumerate(lengths):
        add(scheduler, str(i), length, **sampling)
    deliver(scheduler, plan_of(scheduler))
    return scheduler


class TestHowMany:
    def test_all_decode(self) -> None:
        scheduler = decoding(2, 5)
        plan = plan_of(scheduler)
        assert (plan.num_steps, plan.num_tokens, plan.tokens_per_step) == (8, 16, 2)
        assert shape(plan) == [("0", 2, 8, True), ("1", 5, 8, True)]
        assert [len(e.page_tables[0]) for e in plan.scheduled] == [3, 4]
        ahead = plan_of(scheduler)  # before the first plan's tokens are known
        assert (ahead.num_steps, shape(ahead)) == (8, [("0", 10, 8, True), ("1", 13, 8, True)])
        updates = deliver(scheduler, plan)
        assert [u.new_token_ids for u in updates] == [[7] * 8] * 2
        stats = scheduler.stats()
        assert (stats.num_steps, stats.scheduled_tokens, stats.num_generation_tokens) == (17, 2, 18)

    def test_off_by_default(self) -> None:
        assert plan_of(decoding(2, max_decode_steps=None)).num_steps == 1

    def test_up_to_the_length_of_the_shortest(self) -> None:
        scheduler = decoding(2, 3, sampling={"max_tokens": 6})
        add(scheduler, "late", 2, max_tokens=4)
        first = plan_of(scheduler)
        assert (first.num_steps, shape(first)[2]) == (1, ("late", 0, 2, True))
        plans = [plan_of(scheduler)]
        assert (plans[0].num_steps, len(plans[0].scheduled)) == (3, 3)
        plans.append(plan_of(scheduler))  # "late" ends with what is in flight
        assert (plans[1].num_steps, [e[0] for e in shape(plans[1])]) == (1, ["0", "1"])
        assert scheduler.schedule() is None
        for plan in (first, *plans):
            deliver(scheduler, plan)
        assert scheduler.is_idle
        assert scheduler.stats().num_generation_tokens == 6 + 6 + 4

    def test_a_prompt_that_is_not_computed_yet(self) -> None:
        scheduler = decoding(2)
        add(scheduler, "long", 33)
        assert [plan_of(scheduler).num_steps for _ in range(4)] == [1, 1, 1, 8]

    def test_who_waits_for_pages_is_asked_for_after_each_step(self) -> None:
        scheduler = decoding(2, num_pages=12)
        add(scheduler, "big", 41, max_tokens=2)
        assert plan_of(scheduler).num_steps == 1
        scheduler.abort(["big"])
        assert plan_of(scheduler).num_steps == 8

    def test_who_waits_for_a_row_changes_nothing(self) -> None:
        scheduler = decoding(2, 2, max_num_seqs=2)
        add(scheduler, "third", 2)
        assert plan_of(scheduler).num_steps == 8
        scheduler.abort(["0"])
        assert plan_of(scheduler).num_steps == 1

    @pytest.mark.parametrize(
        ("sampling", "num_steps"),
        [
            ({"logprobs": 0}, 1),
            ({"bad_word_ids": [[3]]}, 1),
            ({"prompt_logprobs": 0}, 8),  # of prompts, and those are computed
            ({"min_tokens": 6}, 5),  # stops are banned for five more tokens
            ({"min_tokens": 1}, 8),
            ({"stop_token_ids": [3], "presence_penalty": 1.0}, 8),
        ],
    )
    def test_what_needs_the_host(self, sampling: dict[str, Any], num_steps: int) -> None:
        scheduler = decoding(2, 2, sampling=sampling)
        assert plan_of(scheduler).num_steps == num_steps

    def test_nobody_is_preempted_for_it(self) -> None:
        """Each of four requests holds a page, and would take two more for 8 steps: 7 are free, then
        8."""
        scheduler = decoding(2, 2, 2, 2, num_pages=12)
        assert plan_of(scheduler).num_steps == 1
        scheduler = decoding(2, 2, 2, 2, num_pages=13)
        plan = plan_of(scheduler)
        assert plan.num_steps == 8
        assert scheduler.stats().num_preemptions == 0


class TestResults:
    def test_tokens_after_a_stop_are_dropped_and_their_pages_freed(self) -> None:
        scheduler = decoding(2, 2)
        plan, ahead = plan_of(scheduler), plan_of(scheduler)
        tokens = [[5, 5, EOS, 6, 6, 6, 6, 6], [5] * 8]
        stopped, other = scheduler.update(plan, StepResult(tokens))
        assert (stopped.new_token_ids, other.new_token_ids) == ([5, 5, EOS], [5] * 8)
        assert stopped.request.finish_reason is FinishReason.STOP
        assert stopped.request.output_token_ids == [7, 5, 5, EOS]
        scheduler.check_integrity()
        assert [u.request for u in deliver(scheduler, ahead)] == [other.request]
        assert stopped.request.output_token_ids == [7, 5, 5, EOS]

    def test_only_pages_of_known_tokens_are_found(self) -> None:
        """After the stop the device has written three more pages: nobody may share them."""
        scheduler = decoding(2)
        plan = plan_of(scheduler)
        scheduler.update(plan, StepResult([[5, 5, 5, 5, EOS, 6, 6, 6]]))
        again = make_request("again", [*plan.scheduled[0].request.token_ids, 6, 6, 6, 6, 6])
        scheduler.add(again)
        plan_of(scheduler)
        assert again.num_cached_tokens == 8  # two pages: prompt 2, outputs 7 5 5 5 5 and the stop

    def test_a_failure_in_the_middle(self) -> None:
        scheduler = decoding(2, 2)
        plan = plan_of(scheduler)
        tokens = [[5] * 8, [5, 6]]
        _, failed = scheduler.update(plan, StepResult(tokens, failed=frozenset({1})))
        assert failed.new_token_ids == [5, 6]
        assert failed.request.finish_reason is FinishReason.ERROR
        scheduler.check_integrity()


def test_a_request_that_nobody_reads_step_by_step_is_told_of_once() -> None:
    scheduler = make_scheduler()
    quiet = make_request("quiet", [1, 2], max_tokens=3)
    quiet.is_streamed = False
    scheduler.add(quiet)
    add(scheduler, "loud", 2, max_tokens=3)
    told = [[(u.request.request_id, u.new_token_ids) for u in updates] for updates in (
        deliver(scheduler, plan_of(scheduler)) for _ in range(3)
    )]  # fmt: skip
    loud = ("loud", [7])
    assert told == [[loud], [loud], [("quiet", [7, 7, 7]), loud]]
