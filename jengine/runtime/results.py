"""Reading what a step sampled, and log-probabilities that requests asked for, off the device."""

import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jengine.config import LogprobsMode
from jengine.core.plan import ScheduledRequest, StepPlan, TokenLogprobs
from jengine.layers.sampling import Logprobs
from jengine.runtime.programs import SCORE_ROWS
from jengine.runtime.step import StepOutput


def read_sampled(sampled_2KS: np.ndarray, plan: StepPlan) -> tuple[list[list[int]], frozenset[int]]:
    """(ids of each request, up to one whose logits were not finite; indices of those requests)."""
    sampled = sampled_2KS[:, : plan.num_steps, : len(plan.scheduled)]
    # `tolist` is one call for all: int() of each element costs 0.1 ms for 256.
    token_ids: list[list[int]] = sampled[0].T.tolist()
    is_finite_KS = sampled[1] != 0
    if is_finite_KS.all():
        return token_ids, frozenset()
    failed = frozenset(
        s for s in np.flatnonzero(~is_finite_KS.all(axis=0)).tolist() if plan.scheduled[s].samples
    )
    for s in failed:
        del token_ids[s][int(is_finite_KS[:, s].argmin()) :]
    return token_ids, failed


def read_logprobs(
    output: StepOutput,
    scheduled: Sequence[ScheduledRequest],
    token_ids: Sequence[list[int]],
    num_top: int,
    mode: LogprobsMode = "raw_logprobs",
) -> list[TokenLogprobs | None]:
    """Log-probabilities of the tokens sampled in one step, one entry per scheduled request; None
    where it did not ask. Of one that names tokens only the sampled token's: see `Scorer.name`.
    """
    is_normalised = mode.endswith("logprobs")
    table = _HostTable(output.logprobs, output.logits, num_top, is_normalised=is_normalised)
    return [
        table.entry(s, ids[0], 0 if params.logprob_token_ids else params.logprobs or 0)
        if item.samples and ids and (params := item.request.sampling).wants_logprobs
        else None
        for s, (item, ids) in enumerate(zip(scheduled, token_ids, strict=True))
    ]


class Scorer:
    """Log-probabilities of given tokens, from the hidden states that a step leaves behind: of a
    prompt, and those that a request names.

    A separate program, so that the step never computes logits for a whole prompt and takes no lists
    of ids along; it runs only for requests with `prompt_logprobs` or `logprob_token_ids`.
    """

    def __init__(self, score: Callable[..., tuple[Logprobs, jax.Array]], num_top: int) -> None:
        """`score` runs the program over (hidden [R, D], targets i32[R])."""
        self._run = score
        self._num_top = num_top

    def read(
        self, hidden: jax.Array, scheduled: Sequence[ScheduledRequest]
    ) -> list[list[TokenLogprobs] | None] | None:
        """For each request that asked: one entry per prompt token predicted by this step's
        positions. None if no position of theirs does.
        """
        if not any(
            item.request.sampling.prompt_logprobs is not None
            and item.start + 1 < item.request.num_prompt_tokens
            for item in scheduled
        ):
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

    def name(
        self,
        hidden: jax.Array,
        scheduled: Sequence[ScheduledRequest],
        entries: Sequence[TokenLogprobs | None],
    ) -> Sequence[TokenLogprobs | None]:
        """`entries`, each with the tokens that its request names behind the sampled one."""
        asked: list[tuple[int, int, list[int]]] = []  # index of the entry, row of `hidden`, tokens
        stop = 0
        for s, (item, entry) in enumerate(zip(scheduled, entries, strict=True)):
            stop += item.num_tokens
            if entry is not None and (named := item.request.sampling.logprob_token_ids):
                asked.append((s, stop - 1, named))
        if not asked:
            return entries
        hidden_TD = np.asarray(hidden)
        rows = [row for _, row, named in asked for _ in named]
        scores = iter(self._score(hidden_TD[rows], [i for _, _, named in asked for i in named], 0))
        results = list(entries)
        for s, _, named in asked:
            sampled, others = entries[s], list(itertools.islice(scores, len(named)))
            assert sampled is not None
            results[s] = TokenLogprobs(
                [*sampled.token_ids, *named],
                [*sampled.logprobs, *(other.logprobs[0] for other in others)],
                sampled.rank,
                [other.rank for other in others],
            )
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
            scores, logits = self._run(rows, ids)
            table = _HostTable(scores, logits, self._num_top)
            entries += [table.entry(r, token, count) for r, token in enumerate(chunk)]
        return entries


class _HostTable:
    """Host view of `Logprobs`; whole-vocabulary rows are made from logits when asked for."""

    def __init__(
        self,
        scores: Logprobs,
        logits: jax.Array | None,
        num_top: int,
        *,
        is_normalised: bool = True,
    ) -> None:
        self._chosen, self._rank = np.asarray(scores.chosen), np.asarray(scores.rank)
        self._top_ids, self._top_values = np.asarray(scores.top_ids), np.asarray(scores.top_values)
        self._logits = logits
        self._num_top = num_top
        self._is_normalised = is_normalised

    def entry(self, row: int, token: int, count: int) -> TokenLogprobs:
        """The chosen token, then the best `count` (-1: all)."""
        if 0 <= count <= self._num_top:
            ids, values = self._top_ids[row, :count], self._top_values[row, :count]
        else:
            # Indexing the device array would compile a slice; a whole copy does not.
            logits = np.asarray(self._logits)[row].astype(np.float64)
            logp = logits
            if self._is_normalised:
                shifted = logits - logits.max()
                logp = shifted - np.log(np.exp(shifted).sum())
            ids = np.argsort(-logp, kind="stable")[: None if count < 0 else count]
            values = logp[ids]
        return TokenLogprobs(
            [token, *ids.tolist()],
            [float(self._chosen[row]), *values.tolist()],
            int(self._rank[row]),
        )
