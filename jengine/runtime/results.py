"""Reading log-probabilities that requests asked for off the device."""

from collections.abc import Sequence

import jax
import numpy as np

from jengine.core.plan import ScheduledRequest, TokenLogprobs
from jengine.layers.sampling import Logprobs
from jengine.runtime.programs import SCORE, SCORE_ROWS, Programs
from jengine.runtime.step import StepOutput


def read_logprobs(
    output: StepOutput, scheduled: Sequence[ScheduledRequest], ids: Sequence[int], num_top: int
) -> list[TokenLogprobs | None] | None:
    """Log-probabilities of sampled tokens, one entry per scheduled request, or None if nobody
    asked.
    """
    wanted = [item.request.sampling.logprobs if item.samples else None for item in scheduled]
    if all(count is None for count in wanted):
        return None
    table = _HostTable(output.logprobs, output.logits, num_top)
    return [
        None if count is None else table.entry(s, ids[s], count) for s, count in enumerate(wanted)
    ]


class PromptScorer:
    """Log-probabilities of prompt tokens, from the hidden states that a step leaves behind.

    A separate program, so that the step never computes logits for a whole prompt; it runs only for
    requests with `prompt_logprobs`.
    """

    def __init__(self, programs: Programs, leaves: tuple[jax.Array, ...], num_top: int) -> None:
        self._programs = programs
        self._leaves = leaves
        self._num_top = num_top

    def read(
        self, hidden: jax.Array, scheduled: Sequence[ScheduledRequest]
    ) -> list[list[TokenLogprobs] | None] | None:
        """For each request that asked: one entry per prompt token predicted by this step's
        positions.
        """
        if all(item.request.sampling.prompt_logprobs is None for item in scheduled):
            return None
        hidden_TD = np.asarray(hidden)
        results: list[list[TokenLogprobs] | None] = []
        first = 0
        for item in scheduled:
            count = item.request.sampling.prompt_logprobs
            targets = item.request.prompt_token_ids[
                item.start + 1 : item.start + item.num_tokens + 1
            ]
            if count is None:
                results.append(None)
            else:
                results.append(self._score(hidden_TD[first : first + len(targets)], targets, count))
            first += item.num_tokens
        return results

    def _score(
        self, hidden_RD: np.ndarray, targets: Sequence[int], count: int
    ) -> list[TokenLogprobs]:
        entries: list[TokenLogprobs] = []
        for start in range(0, len(targets), SCORE_ROWS):
            chunk = targets[start : start + SCORE_ROWS]
            rows = np.zeros((SCORE_ROWS, hidden_RD.shape[1]), hidden_RD.dtype)
            rows[: len(chunk)] = hidden_RD[start : start + len(chunk)]
            ids = np.zeros(SCORE_ROWS, np.int32)
            ids[: len(chunk)] = chunk
            scores, logits = self._programs[SCORE](self._leaves, rows, ids)
            table = _HostTable(scores, logits, self._num_top)
            entries += [table.entry(r, token, count) for r, token in enumerate(chunk)]
        return entries


class _HostTable:
    """Host view of `Logprobs`; whole-vocabulary rows are made from logits when asked for."""

    def __init__(self, scores: Logprobs, logits: jax.Array, num_top: int) -> None:
        self._chosen, self._rank = np.asarray(scores.chosen), np.asarray(scores.rank)
        self._top_ids, self._top_values = np.asarray(scores.top_ids), np.asarray(scores.top_values)
        self._logits = logits
        self._num_top = num_top

    def entry(self, row: int, token: int, count: int) -> TokenLogprobs:
        """The chosen token, then the best `count` (-1: all)."""
        if 0 <= count <= self._num_top:
            ids, values = self._top_ids[row, :count], self._top_values[row, :count]
        else:
            # Indexing the device array would compile a slice; a whole copy does not.
            logits = np.asarray(self._logits)[row].astype(np.float64)
            shifted = logits - logits.max()
            logp = shifted - np.log(np.exp(shifted).sum())
            ids = np.argsort(-logp, kind="stable")[: None if count < 0 else count]
            values = logp[ids]
        return TokenLogprobs(
            [token, *ids.tolist()],
            [float(self._chosen[row]), *values.tolist()],
            int(self._rank[row]),
        )
