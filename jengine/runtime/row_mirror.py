"""What a step needs to know of each running request, by row: written at admission, gathered for
every step. No JAX.
"""

import struct
from collections.abc import Sequence
from typing import Final

import numpy as np

from jengine.core.plan import ScheduledRequest
from jengine.logits_processors import ProcessorInfo, count_words, encode_arguments
from jengine.request import SamplingParams

# Sampling parameters of a row: name -> format character (of `struct`). 32 bits each.
ROW_FIELDS: Final = {
    "adjusted_rows": "i",
    "temperature": "f",
    "top_k": "i",
    "top_p": "f",
    "min_p": "f",
    "presence": "f",
    "frequency": "f",
    "repetition": "f",
    "seed_low": "I",
    "seed_high": "I",
}
_ROW = struct.Struct("=" + "".join(ROW_FIELDS.values()))


class RowFlag:
    """What a request asks of the step. The flags of a batch are those of its rows together.

    Plain bits: each operation of an `IntFlag` takes a microsecond.
    """

    SPECIAL = 1  # not plain greedy
    ADJUSTED = 2  # needs its tables in the row state
    TRUNCATED = 4  # min_p, top_k or top_p
    LOGPROBS = 8
    PROMPT_LOGPROBS = 16
    BANS = 32  # some steps ban tokens: min_tokens, bad words
    CONSTRAINED = 64  # has a mask of allowed tokens for each step


PageUpdates = tuple[list[int], list[int]]  # (slots = row * pages_per_seq + index, page ids)


class RowMirror:
    """Sampling parameters of all rows, as arrays, and how much of their page tables the device has.

    Filling parameters anew cost 5 us per sequence and step; they change at admission only. Row
    `num_rows` is nobody's: what it holds is the padding of a batch.

    Page tables lie on the device and are kept up by appending: they only grow, and an entry that
    the manager nulls (below a sliding window) is never read again, so the stale id may stay. So may
    what a row's last request left behind its new one's last page.
    """

    def __init__(
        self,
        num_groups: int,
        num_rows: int,
        pages_per_seq: int,
        processors: Sequence[ProcessorInfo] = (),
    ) -> None:
        self.num_rows = num_rows
        self._pages_per_seq = pages_per_seq
        self.params = np.zeros((len(ROW_FIELDS), num_rows + 1), np.int32)
        self.flags = np.zeros(num_rows + 1, np.int32)
        self._processors = processors
        self.extra = np.zeros((num_rows + 1, count_words(processors)), np.int32)
        self._num_pages = [[0] * num_rows for _ in range(num_groups)]
        self._set_params(num_rows, SamplingParams(temperature=0.0), seed=0)

    def admit(self, item: ScheduledRequest) -> np.ndarray | None:
        """Take in who got a row. Returns its page tables, i32[groups, pages_per_seq], if the caller
        must bring them to the device itself: a batch has room for one new page per token, and a hit
        in the prefix cache may bring more."""
        self._set_params(item.row, item.request.sampling, item.request.seed)
        if item.request.constraint is not None:
            self.flags[item.row] |= RowFlag.CONSTRAINED
        num_known = len(item.page_tables[0]) if len(item.page_tables[0]) > item.num_tokens else 0
        for num_pages in self._num_pages:
            num_pages[item.row] = num_known
        if not num_known:
            return None
        tables = np.zeros((len(item.page_tables), self._pages_per_seq), np.int32)
        tables[:, :num_known] = item.page_tables
        return tables

    def new_pages(self, scheduled: Sequence[ScheduledRequest]) -> list[PageUpdates]:
        """What each group's tables have more than the device has; it is told by this call."""
        updates: list[PageUpdates] = []
        for group, num_pages in enumerate(self._num_pages):
            slots: list[int] = []
            ids: list[int] = []
            for item in scheduled:
                pages, row = item.page_tables[group], item.row
                known = num_pages[row]
                if len(pages) > known:
                    first = row * self._pages_per_seq
                    slots += range(first + known, first + len(pages))
                    ids += pages[known:]
                    num_pages[row] = len(pages)
            updates.append((slots, ids))
        return updates

    def _set_params(self, row: int, p: SamplingParams, seed: int) -> None:
        adjusted = row < self.num_rows and is_adjusted(p, self._processors)
        if adjusted and self._processors:
            self.extra[row] = encode_arguments(self._processors, p.extra_args)
        flags = 0
        if adjusted:
            flags |= RowFlag.ADJUSTED | RowFlag.SPECIAL
        if not p.is_greedy:
            flags |= RowFlag.SPECIAL
            if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0:
                flags |= RowFlag.TRUNCATED
        if p.wants_logprobs:
            flags |= RowFlag.LOGPROBS
        if p.prompt_logprobs is not None:
            flags |= RowFlag.PROMPT_LOGPROBS
        if p.min_tokens or p.bad_word_ids:
            flags |= RowFlag.BANS
        values = _ROW.pack(
            row if adjusted else self.num_rows,
            0.0 if p.is_greedy else p.temperature,
            *((0, 1.0, 0.0) if p.is_greedy else (p.top_k, p.top_p, p.min_p)),
            p.presence_penalty,
            p.frequency_penalty,
            p.repetition_penalty,
            seed & 0xFFFFFFFF,
            (seed >> 32) & 0xFFFFFFFF,
        )
        self.params[:, row] = np.frombuffer(values, np.int32)
        self.flags[row] = flags


def is_adjusted(sampling: SamplingParams, processors: Sequence[ProcessorInfo] = ()) -> bool:
    """Whether the request needs its tables in the row state. Logits processors may look at them."""
    return bool(
        sampling.has_penalties
        or sampling.logit_bias
        or sampling.allowed_token_ids is not None
        or (processors and (sampling.extra_args or any(not p.parameters for p in processors)))
    )
