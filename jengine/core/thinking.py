"""`thinking_token_budget`: the end of a reasoning block, forced when its tokens are used up."""

from collections.abc import Iterable

import numpy as np

from jengine.request import FinishReason, Request


class ThinkingBudget:
    """A `TokenConstraint` that allows everything until a block has had its tokens, and then only
    the next token of the end marker. A token that the request bans for now is not forced: the block
    goes on until it may be.

    Where a block begins and ends is read from the prompt's tokens and the request's own; the
    prompt's part of an open block counts (vLLM).
    """

    def __init__(self, request: Request, vocab_size: int) -> None:
        sampling = request.sampling
        assert sampling.thinking_token_budget is not None and sampling.thinking_markers is not None
        self.is_ready = True
        self.mask: np.ndarray | None = None
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._start, self._end = sampling.thinking_markers
        self._budget = sampling.thinking_token_budget
        self._num_words = -(-vocab_size // 32)
        self._tokens = request.token_ids  # the scheduler appends to it
        first = _end_of_last(self._tokens, self._start)
        is_open = first > _end_of_last(self._tokens, self._end)
        self._first = first if is_open else None  # of the open block's tokens
        self._look_ahead(request.banned_ids(0))

    def advance(self, token_id: int, banned: Iterable[int]) -> None:
        first, tokens = self._first, self._tokens
        if first is None:
            if tokens[-len(self._start) :] == self._start:
                self._first = len(tokens)
        elif tokens[max(first, len(tokens) - len(self._end)) :] == self._end:
            self._first = None
        self._look_ahead(banned)

    def _look_ahead(self, banned: Iterable[int]) -> None:
        self.mask = None
        if self._first is None or len(self._tokens) - self._first < self._budget:
            return
        token_id = self._end[self._num_said()]
        if token_id not in banned:
            self.mask = np.zeros(self._num_words, np.int32)
            self.mask[token_id // 32] = np.uint32(1 << token_id % 32).view(np.int32)

    def _num_said(self) -> int:
        """How much of the end marker the block's last tokens are."""
        assert self._first is not None
        most = min(len(self._end) - 1, len(self._tokens) - self._first)
        said = (k for k in range(most, 0, -1) if self._tokens[-k:] == self._end[:k])
        return next(said, 0)


def _end_of_last(tokens: list[int], marker: list[int]) -> int:
    """Index behind the last place of `marker`; 0 if there is none. `list.index` looks at a prompt
    of 100k tokens in a millisecond, on the engine's thread; a loop takes ten.
    """
    backwards, last = tokens[::-1], -1
    while True:
        try:
            last = backwards.index(marker[-1], last + 1)
        except ValueError:
            return 0
        stop = len(tokens) - last
        if tokens[max(stop - len(marker), 0) : stop] == marker:
            return stop
