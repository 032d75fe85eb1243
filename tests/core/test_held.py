"""Constrained requests in the scheduler: left out while nothing is known, then on, or at an end."""

from collections.abc import Iterable

import numpy as np

from jengine.core.held import CompilingRequests
from jengine.request import FinishReason, Request, RequestStatus
from tests.core.driver import add, deliver, make_scheduler, plan_of, shape
from tests.core.factories import make_request


class Gate:
    """A constraint that is ready when the test says so."""

    def __init__(self) -> None:
        self.is_ready = True
        self.mask: np.ndarray | None = None
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.taken: list[tuple[int, list[int]]] = []

    def advance(self, token_id: int, banned: Iterable[int]) -> None:
        self.is_ready = False
        self.taken.append((token_id, list(banned)))


def constrained(request: Request) -> Gate:
    gate = Gate()
    request.constrain(gate)
    return gate


def test_it_is_left_out_until_it_is_ready() -> None:
    scheduler = make_scheduler()
    gate = constrained(add(scheduler, "bound", 3, max_tokens=5, min_tokens=2))
    add(scheduler, "free", 3, max_tokens=5)
    first = plan_of(scheduler)
    second = plan_of(scheduler)  # ahead
    assert shape(second) == [("free", 3, 1, True)], "its token is on the device"
    deliver(scheduler, first, token=9)
    assert gate.taken == [(9, [0])], "the end of sequence is banned by min_tokens"
    assert shape(plan_of(scheduler)) == [("free", 4, 1, True)]
    assert scheduler.settle() == []
    gate.is_ready = True
    third = plan_of(scheduler)
    assert "bound" not in {r.request.request_id for r in third.scheduled}, "ready when settled"
    assert scheduler.settle() == []
    fourth = plan_of(scheduler)
    assert ("bound", 3, 1, True) in shape(fourth)


def test_a_finished_grammar_ends_it() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "bound", 3, max_tokens=5)
    gate = constrained(request)
    deliver(scheduler, plan_of(scheduler), token=9)
    gate.is_ready, gate.finish_reason = True, FinishReason.STOP
    (update,) = scheduler.settle()
    assert (update.request, update.new_token_ids) == (request, [])
    assert request.finish_reason is FinishReason.STOP
    assert request.output_token_ids == [9]
    scheduler.check_integrity()
    assert scheduler.is_idle


def test_an_error_is_handed_on() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "bound", 3, max_tokens=5)
    request.is_streamed = False
    gate = constrained(request)
    deliver(scheduler, plan_of(scheduler), token=9)
    gate.is_ready, gate.finish_reason, gate.error = True, FinishReason.ERROR, "too much"
    (update,) = scheduler.settle()
    assert update.new_token_ids == [9], "nobody has heard of it yet"
    assert (request.finish_reason, request.error) == (FinishReason.ERROR, "too much")


def test_preempted_while_it_is_held() -> None:
    scheduler = make_scheduler(num_pages=5, max_model_len=17)
    gate = constrained(add(scheduler, "bound", 4, max_tokens=9))
    other = add(scheduler, "other", 4, max_tokens=9)
    deliver(scheduler, plan_of(scheduler))
    request = scheduler._requests["bound"]
    scheduler._running.remove(request)
    scheduler._preempt(request)
    for _ in range(2):
        deliver(scheduler, plan_of(scheduler))
        assert request.status is RequestStatus.PREEMPTED, "its mask is not known yet"
    gate.is_ready = True
    scheduler.settle()
    assert ("bound", 4, 1, True) in shape(plan_of(scheduler)), "its full page was a hit"
    assert other.num_preemptions == 0


def test_finished_while_it_is_held() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "bound", 3, max_tokens=5)
    gate = constrained(request)
    deliver(scheduler, plan_of(scheduler))
    assert scheduler.abort(["bound"]) == [request]
    gate.is_ready, gate.finish_reason = True, FinishReason.STOP
    assert scheduler.settle() == []
    assert request.finish_reason is FinishReason.ABORT


def test_its_last_token_is_not_taken_in() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "bound", 3, max_tokens=1)
    gate = constrained(request)
    deliver(scheduler, plan_of(scheduler))
    assert request.finish_reason is FinishReason.LENGTH
    assert gate.taken == []


def test_requests_whose_grammar_is_compiled() -> None:
    compiling = CompilingRequests()
    requests = [make_request(name, [1, 2]) for name in "abc"]
    gates = [constrained(request) for request in requests]
    for request, gate in zip(requests, gates, strict=True):
        gate.is_ready = False
        compiling.add(request)
    gates[2].is_ready = True
    assert compiling.take_ready() == [requests[2]]
    assert compiling.abort(["x", "a"], FinishReason.ABORT) == [requests[0]]
    assert requests[0].is_finished
    gates[1].is_ready = True
    assert compiling.take_ready() == [requests[1]]
    assert len(compiling) == 0
