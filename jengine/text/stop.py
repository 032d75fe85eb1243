"""Stop strings in a growing text."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Which stop string ended the text."""

    stop: str


class StopChecker:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    Text that may turn out to be the beginning of a stop string is held back (at most the longest
    one's length less one character), so what was returned is never taken back.
    """

    def __init__(self, stops: Sequence[str], *, include_stop_str_in_output: bool = False) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._include = include_stop_str_in_output
        self._held = ""
        self.match: StopMatch | None = None

    def add(self, text: str, *, may_match: bool = True) -> str:
        """The text that is now safe to give out. After a match (see `match`) nothing more is.

        `may_match=False` (before `min_tokens`): a stop string that ends in this text does not
        count.
        """
        if self.match is not None or not text:
            return ""
        held = self._held + text
        found = self._first_match(held, len(self._held)) if may_match else None
        if found is None:
            keep = self._num_to_hold(held)
            self._held = held[len(held) - keep :]
            return held[: len(held) - keep]
        start, stop = found
        self.match = StopMatch(stop)
        self._held = ""
        return held[: start + len(stop)] if self._include else held[:start]

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, num_old: int) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first; of those, the one that starts first
        (the longest).

        That is what checking after every character finds, so the result does not depend on how
        tokens cut the text. A match ends in new text, hence starts at most its length before it.
        """
        found = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _num_to_hold(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
