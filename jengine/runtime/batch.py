"""StepPlan -> one int32 array on the host -> `DeviceBatch` inside the step.

All metadata of a step travels as a single array: a host-to-device copy costs tens of microseconds
whatever its size. Floats are stored as their bits.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jengine.core.plan import ScheduledRequest, StepPlan
from jengine.layers.sampling import SamplingInputs
from jengine.request import MAX_BANNED_IDS, SamplingParams

Kind = Literal["i32", "f32", "u32", "bool"]
PENDING = -1  # token id: the newest sampled token of the row, still on the device


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """Shapes of one bucket, and where each field lies in the packed array."""

    num_tokens: int
    num_seqs: int
    num_groups: int
    pages_per_seq: int
    num_rows: int
    vocab_size: int

    @functools.cached_property
    def fields(self) -> dict[str, tuple[Kind, tuple[int, ...]]]:
        T, S = self.num_tokens, self.num_seqs
        return {
            "token_ids": ("i32", (T,)),
            "positions": ("i32", (T,)),
            "seq_ids": ("i32", (T,)),
            "page_tables": ("i32", (self.num_groups, S, self.pages_per_seq)),
            "cu_q_lens": ("i32", (S + 1,)),
            "kv_lens": ("i32", (S,)),
            "last_token_index": ("i32", (S,)),
            "samples": ("bool", (S,)),
            "rows": ("i32", (S,)),
            "adjusted_rows": ("i32", (S,)),
            "sample_positions": ("i32", (S,)),
            "temperature": ("f32", (S,)),
            "top_k": ("i32", (S,)),
            "top_p": ("f32", (S,)),
            "min_p": ("f32", (S,)),
            "presence": ("f32", (S,)),
            "frequency": ("f32", (S,)),
            "repetition": ("f32", (S,)),
            "seeds": ("u32", (S, 2)),
            "banned": ("i32", (S, MAX_BANNED_IDS)),
            "num_tokens": ("i32", ()),
            "num_seqs": ("i32", ()),
            "any_special": ("bool", ()),
            "any_adjusted": ("bool", ()),
            "any_truncated": ("bool", ()),
            "any_logprobs": ("bool", ()),
        }

    @functools.cached_property
    def offsets(self) -> dict[str, slice]:
        offsets, start = {}, 0
        for name, (_, shape) in self.fields.items():
            size = math.prod(shape)
            offsets[name] = slice(start, start + size)
            start += size
        return offsets

    @property
    def size(self) -> int:
        return max(s.stop for s in self.offsets.values())

    def empty(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A batch of padding only: (packed i32[size], writable views by field)."""
        packed = np.zeros(self.size, np.int32)
        views = {}
        for name, (kind, shape) in self.fields.items():
            view = packed[self.offsets[name]]
            dtype = {"f32": np.float32, "u32": np.uint32}.get(kind)
            views[name] = (view if dtype is None else view.view(dtype)).reshape(shape)
        views["rows"][:] = self.num_rows
        views["adjusted_rows"][:] = self.num_rows
        views["banned"][:] = self.vocab_size
        views["top_p"][:] = 1.0
        views["repetition"][:] = 1.0
        return packed, views


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """The unpacked metadata of one step. See `AttentionMetadata` and `SamplingInputs` for the
    shared names.
    """

    token_ids: jax.Array  # i32[T]; PENDING where the id is on the device
    positions: jax.Array  # i32[T]
    seq_ids: jax.Array  # i32[T]
    page_tables: tuple[jax.Array, ...]  # per group, i32[S, M]
    cu_q_lens: jax.Array  # i32[S+1]
    kv_lens: jax.Array  # i32[S]
    last_token_index: jax.Array  # i32[S]
    samples: jax.Array  # bool[S]
    num_tokens: jax.Array  # i32[]
    num_seqs: jax.Array  # i32[]
    sampling: SamplingInputs


def unpack_batch(packed: jax.Array, layout: BatchLayout) -> DeviceBatch:
    """Inverse of `build_batch`, traced inside the step."""
    a: dict[str, jax.Array] = {}
    for name, (kind, shape) in layout.fields.items():
        value = packed[layout.offsets[name]].reshape(shape)
        if kind in ("f32", "u32"):
            value = jax.lax.bitcast_convert_type(
                value, jnp.float32 if kind == "f32" else jnp.uint32
            )
        elif kind == "bool":
            value = value != 0
        a[name] = value
    sampling_fields = {f.name for f in dataclasses.fields(SamplingInputs)} - {"positions"}
    sampling = SamplingInputs(
        positions=a["sample_positions"], **{name: a[name] for name in sampling_fields}
    )
    batch_fields = {f.name for f in dataclasses.fields(DeviceBatch)} - {"sampling", "page_tables"}
    tables = tuple(a["page_tables"][g] for g in range(layout.num_groups))
    return DeviceBatch(
        sampling=sampling, page_tables=tables, **{name: a[name] for name in batch_fields}
    )


class PageTableMirror:
    """The page tables of all rows as one array, kept up by appending.

    Copying every list anew would cost O(context) per sequence and step; tables only grow, and an
    entry that the manager nulls (below a sliding window) is never read again, so the stale id may
    stay.
    """

    def __init__(self, num_groups: int, num_rows: int, pages_per_seq: int) -> None:
        self.tables = np.zeros((num_groups, num_rows, pages_per_seq), np.int32)
        self._lengths = np.zeros((num_groups, num_rows), np.int64)

    def update(self, scheduled: ScheduledRequest) -> None:
        row = scheduled.row
        for g, pages in enumerate(scheduled.page_tables):
            known = 0 if scheduled.is_admitted else int(self._lengths[g, row])
            if scheduled.is_admitted:
                self.tables[g, row] = 0
            if len(pages) > known:
                self.tables[g, row, known : len(pages)] = pages[known:]
            self._lengths[g, row] = len(pages)


def build_batch(plan: StepPlan, layout: BatchLayout, mirror: PageTableMirror) -> np.ndarray:
    """Pack a plan for the bucket of `layout`."""
    packed, a = layout.empty()
    start = 0
    for s, item in enumerate(plan.scheduled):
        mirror.update(item)
        stop = start + item.num_tokens
        known = item.request.token_ids[item.start : item.start + item.num_tokens]
        a["token_ids"][start : start + len(known)] = known
        a["token_ids"][start + len(known) : stop] = PENDING
        a["positions"][start:stop] = np.arange(item.start, item.start + item.num_tokens)
        a["seq_ids"][start:stop] = s
        a["cu_q_lens"][s + 1] = stop
        a["kv_lens"][s] = item.start + item.num_tokens
        a["last_token_index"][s] = stop - 1
        start = stop
    num_seqs = len(plan.scheduled)
    a["cu_q_lens"][num_seqs + 1 :] = start
    rows = [item.row for item in plan.scheduled]
    a["page_tables"][:, :num_seqs] = mirror.tables[:, rows]
    a["rows"][:num_seqs] = rows
    a["num_tokens"][...] = start
    a["num_seqs"][...] = num_seqs
    _fill_sampling(a, plan.scheduled)
    return packed


def is_adjusted(sampling: SamplingParams) -> bool:
    """Whether the request needs its tables in the row state."""
    return bool(
        sampling.has_penalties or sampling.logit_bias or sampling.allowed_token_ids is not None
    )


def _fill_sampling(a: dict[str, np.ndarray], scheduled: Sequence[ScheduledRequest]) -> None:
    any_special = any_adjusted = any_truncated = any_logprobs = False
    for s, item in enumerate(scheduled):
        if not item.samples:
            continue
        request, p = item.request, item.request.sampling
        position = item.start + item.num_tokens
        a["samples"][s] = 1
        a["sample_positions"][s] = position
        any_logprobs |= p.logprobs is not None
        banned = banned_ids(item)
        adjusted = is_adjusted(p)
        if p.is_greedy and not banned and not adjusted:
            continue
        any_special = True
        a["temperature"][s] = 0.0 if p.is_greedy else p.temperature
        a["seeds"][s] = (request.seed & 0xFFFFFFFF, (request.seed >> 32) & 0xFFFFFFFF)
        if not p.is_greedy and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0):
            any_truncated = True
            a["top_k"][s], a["top_p"][s], a["min_p"][s] = p.top_k, p.top_p, p.min_p
        if adjusted or banned:
            any_adjusted = True
            a["banned"][s, : len(banned)] = banned
        if adjusted:
            a["adjusted_rows"][s] = item.row
            a["presence"][s], a["frequency"][s] = p.presence_penalty, p.frequency_penalty
            a["repetition"][s] = p.repetition_penalty
    a["any_special"][...] = any_special
    a["any_adjusted"][...] = any_adjusted
    a["any_truncated"][...] = any_truncated
    a["any_logprobs"][...] = any_logprobs


def banned_ids(item: ScheduledRequest) -> list[int]:
    """Tokens that must not be sampled now: stops before `min_tokens`, and ends of bad words."""
    request, p = item.request, item.request.sampling
    if not p.min_tokens and not p.bad_word_ids:
        return []
    num_outputs = item.start + item.num_tokens - request.num_prompt_tokens
    banned: list[int] = []
    if num_outputs < p.min_tokens:
        banned += request.eos_token_ids
        banned += p.stop_token_ids or ()
    # A request with bad words is never planned ahead (`needs_host_tokens`), so all its tokens are
    # known here.
    for word in p.bad_word_ids or ():
        prefix = word[:-1]
        outputs = request.token_ids[request.num_prompt_tokens :]
        if len(outputs) >= len(prefix) and (not prefix or outputs[-len(prefix) :] == prefix):
            banned.append(word[-1])
    return banned
