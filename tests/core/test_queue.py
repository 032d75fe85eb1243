import random

import pytest

from jengine.core.queue import PriorityQueue, WaitingQueue, build_queue
from jengine.request import Request
from tests.core.factories import make_request


def requests(*keys: tuple[int, float]) -> list[Request]:
    return [
        make_request(str(i), [1], priority=priority, arrival_time=arrival)
        for i, (priority, arrival) in enumerate(keys)
    ]


def drain(queue: WaitingQueue) -> list[str]:
    return [queue.pop().request_id for _ in range(len(queue))]


def test_fcfs_ignores_priority_and_puts_the_preempted_first() -> None:
    queue = build_queue("fcfs")
    a, b, c, d = requests((5, 9.0), (0, 1.0), (1, 2.0), (9, 0.0))
    for request in (a, b, c):
        queue.push(request)
    queue.push_front(d)
    assert [r.request_id for r in queue] == ["3", "0", "1", "2"]
    queue.remove(b)
    assert queue.peek() is d
    assert drain(queue) == ["3", "0", "2"]


def test_priority_then_arrival_then_order_of_coming() -> None:
    queue = build_queue("priority")
    waiting = requests((1, 0.0), (0, 2.0), (0, 1.0), (0, 1.0), (-1, 9.0))
    for request in waiting:
        queue.push(request)
    assert [r.request_id for r in queue] == ["4", "2", "3", "1", "0"]
    assert drain(queue) == ["4", "2", "3", "1", "0"]


def test_preempted_request_goes_before_its_equals_only() -> None:
    queue = build_queue("priority")
    better, equal, preempted = requests((0, 0.0), (1, 0.0), (1, 0.0))
    queue.push(better)
    queue.push(equal)
    queue.push_front(preempted)
    assert drain(queue) == ["0", "2", "1"]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_removed_requests_never_surface(policy) -> None:
    queue = build_queue(policy)
    waiting = requests(*[(i % 3, float(i)) for i in range(200)])
    for request in waiting:
        queue.push(request)
    kept = [r for i, r in enumerate(waiting) if i % 7 == 0]
    for request in random.Random(0).sample(waiting, len(waiting)):
        if request not in kept:
            queue.remove(request)
    assert len(queue) == len(kept)
    expected = sorted(kept, key=lambda r: (r.priority, r.arrival_time))
    assert drain(queue) == [r.request_id for r in (kept if policy == "fcfs" else expected)]


def test_removals_do_not_fill_the_heap() -> None:
    queue = PriorityQueue()
    (first,) = requests((0, 0.0))
    queue.push(first)
    for request in requests(*[(1, float(i)) for i in range(1000)]):
        queue.push(request)
        queue.remove(request)
    assert len(queue) == 1
    assert len(queue._heap) < 30
