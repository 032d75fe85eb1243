"""The order in which waiting requests are admitted."""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from itertools import count
from typing import Literal, Protocol

from jengine.request import Request


class WaitingQueue(Protocol):
    """Requests without pages or rows, next to be admitted first."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Request]: ...
    def push(self, request: Request) -> None: ...
    def push_front(self, request: Request) -> None:
        """Put a preempted request back: before every other of its rank."""
        ...

    def peek(self) -> Request: ...
    def pop(self) -> Request: ...
    def remove(self, request: Request) -> None: ...


def build_queue(policy: Literal["fcfs", "priority"]) -> WaitingQueue:
    return PriorityQueue() if policy == "priority" else FcfsQueue()


def precedence(request: Request) -> tuple[int, float]:
    """Lower goes first, under the priority policy."""
    return request.priority, request.arrival_time


class FcfsQueue:
    """First come, first served.

    An `OrderedDict` and not a deque: clients that go away abort from the middle, thousands at once
    when a gateway restarts, and each removal from a deque costs O(n).
    """

    def __init__(self) -> None:
        self._requests: OrderedDict[Request, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def push(self, request: Request) -> None:
        self._requests[request] = None

    def push_front(self, request: Request) -> None:
        self._requests[request] = None
        self._requests.move_to_end(request, last=False)

    def peek(self) -> Request:
        return next(iter(self._requests))

    def pop(self) -> Request:
        return self._requests.popitem(last=False)[0]

    def remove(self, request: Request) -> None:
        del self._requests[request]


class PriorityQueue:
    """Lowest (priority, arrival time) first.

    A removed request stays in the heap until it surfaces; it has finished, so it never comes back.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Request]] = []
        self._live: set[Request] = set()
        self._tickets = count(1)

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        return (request for *_, request in sorted(self._heap) if request in self._live)

    def push(self, request: Request) -> None:
        self._push(request, next(self._tickets))

    def push_front(self, request: Request) -> None:
        self._push(request, -next(self._tickets))

    def peek(self) -> Request:
        while (request := self._heap[0][-1]) not in self._live:
            heapq.heappop(self._heap)
        return request

    def pop(self) -> Request:
        request = self.peek()
        heapq.heappop(self._heap)
        self._live.remove(request)
        return request

    def remove(self, request: Request) -> None:
        self._live.remove(request)
        # Dead entries never outnumber live ones for long: O(1) a removal, amortised.
        if len(self._heap) > 2 * len(self._live) + 16:
            self._heap = [entry for entry in self._heap if entry[-1] in self._live]
            heapq.heapify(self._heap)

    def _push(self, request: Request, ticket: int) -> None:
        self._live.add(request)
        heapq.heappush(self._heap, (*precedence(request), ticket, request))
