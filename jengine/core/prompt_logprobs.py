"""Which prompt log-probabilities clients have seen.

A preempted request computes its prompt, and them, again.
"""

from jengine.core.plan import ScheduledRequest, TokenLogprobs


class PromptLogprobs:
    def __init__(self) -> None:
        self._num_reported: dict[str, int] = {}  # prompt positions, where asked for

    def unreported(
        self, entry: ScheduledRequest, chunk: list[TokenLogprobs] | None
    ) -> list[TokenLogprobs] | None:
        """The part of a chunk that is new. `chunk[0]` belongs to position `entry.start + 1`."""
        if not chunk:
            return None
        request_id = entry.request.request_id
        num_reported = self._num_reported.get(request_id, 0)
        new = chunk[max(0, num_reported - entry.start) :]
        if not new:
            return None
        self._num_reported[request_id] = entry.start + len(chunk)
        return new

    def forget(self, request_id: str) -> None:
        self._num_reported.pop(request_id, None)
