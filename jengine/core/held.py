"""Constrained requests that wait: for their grammar, or between a token and what may follow it."""

from collections.abc import Iterable

from jengine.request import FinishReason, Request, RequestStatus


class HeldRequests:
    """Requests whose newest token their constraint is taking in."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def hold(self, request: Request) -> None:
        """Give the newest token to the constraint."""
        if request.constraint is not None and not request.is_finished:
            banned = request.banned_ids(request.num_output_tokens)
            request.constraint.advance(request.token_ids[-1], banned)
            request.is_held = True
            self._requests.append(request)

    def take_ended(self) -> list[tuple[Request, FinishReason]]:
        """Those that no token can follow, with their finish reasons. They, and those that may go
        on, are held no longer."""
        if not self._requests:
            return []
        ended, still_held = [], []
        for request in self._requests:
            if request.is_finished or request.constraint is None:
                continue
            if not request.constraint.is_ready:
                still_held.append(request)
                continue
            request.is_held = False
            if (reason := request.constraint.finish_reason) is not None:
                request.error = request.constraint.error
                ended.append((request, reason))
        self._requests = still_held
        return ended


class CompilingRequests:
    """Requests whose grammar is being compiled. They are in no queue: others do not wait for it."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request

    def take_ready(self) -> list[Request]:
        """Those whose constraint has become ready, in the order of their arrival."""
        ready = [
            request
            for request in self._requests.values()
            if request.constraint is not None and request.constraint.is_ready
        ]
        for request in ready:
            del self._requests[request.request_id]
        return ready

    def abort(self, request_ids: Iterable[str], reason: FinishReason) -> list[Request]:
        """Finish requests; ids that are not here are ignored."""
        aborted = [r for i in request_ids if (r := self._requests.pop(i, None)) is not None]
        for request in aborted:
            request.status, request.finish_reason = RequestStatus.FINISHED, reason
        return aborted
