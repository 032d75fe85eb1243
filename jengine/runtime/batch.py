"""StepPlan -> one int32 array on the host -> `DeviceBatch` inside the step.

All metadata of a step travels as a single array: a host-to-device copy costs tens of microseconds
whatever its size. Floats are stored as their bits.
Only the masks of constrained requests are an array of their own, since they are the size of the
vocabulary; where there are none, an empty one lies on the device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jengine.core.plan import ScheduledRequest, StepPlan
from jengine.layers.sampling import SamplingInputs
from jengine.request import MAX_BANNED_IDS
from jengine.runtime.row_mirror import ROW_FIELDS, PageUpdates, RowFlag, RowMirror

Kind = Literal["i32", "bool"]
PENDING = -1  # token id: the newest sampled token of the row, still on the device


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """Shapes of one bucket, and where each field lies in the packed array.

    `max_steps` is the most decode steps that its program runs in one dispatch.
    """

    num_tokens: int
    num_seqs: int
    num_groups: int
    pages_per_seq: int
    num_rows: int
    vocab_size: int
    max_steps: int = 1
    num_extra: int = 0  # words of each sequence for logits processors

    @functools.cached_property
    def fields(self) -> dict[str, tuple[Kind, tuple[int, ...]]]:
        T, S = self.num_tokens, self.num_seqs
        extra: dict[str, tuple[Kind, tuple[int, ...]]] = (
            {"extra": ("i32", (S, self.num_extra))} if self.num_extra else {}
        )
        return extra | {
            "token_ids": ("i32", (T,)),
            "positions": ("i32", (T,)),
            "seq_ids": ("i32", (T,)),
            "cu_q_lens": ("i32", (S + 1,)),
            "kv_lens": ("i32", (S,)),
            "last_token_index": ("i32", (S,)),
            "samples": ("bool", (S,)),
            "rows": ("i32", (S,)),
            "sample_positions": ("i32", (S,)),
            "row_params": ("i32", (len(ROW_FIELDS), S)),
            "banned": ("i32", (S, MAX_BANNED_IDS)),
            "masked": ("bool", (S,)),
            "num_tokens": ("i32", ()),
            "num_seqs": ("i32", ()),
            "num_steps": ("i32", ()),
            "any_special": ("bool", ()),
            "any_adjusted": ("bool", ()),
            "any_truncated": ("bool", ()),
            "any_logprobs": ("bool", ()),
            "page_slots": ("i32", (self.num_groups, T * self.max_steps)),
            "page_ids": ("i32", (self.num_groups, T * self.max_steps)),
        }

    @property
    def mask_shape(self) -> tuple[int, int]:
        """Of the second input: a bit for each token of the vocabulary."""
        return self.num_seqs, -(-self.vocab_size // 32)

    @functools.cached_property
    def offsets(self) -> dict[str, slice]:
        offsets, start = {}, 0
        for name, (_, shape) in self.fields.items():
            size = math.prod(shape)
            offsets[name] = slice(start, start + size)
            start += size
        return offsets

    @functools.cached_property
    def size(self) -> int:
        return max(s.stop for s in self.offsets.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """The unpacked metadata of one step. See `AttentionMetadata` and `SamplingInputs` for the
    shared names.
    """

    token_ids: jax.Array  # i32[T]; PENDING where the id is on the device
    positions: jax.Array  # i32[T]
    seq_ids: jax.Array  # i32[T]
    page_slots: (
        jax.Array
    )  # i32[G, U]: row * M + index, where a page table grows; out of range: none
    page_ids: jax.Array  # i32[G, U]: the pages
    cu_q_lens: jax.Array  # i32[S+1]
    kv_lens: jax.Array  # i32[S]
    last_token_index: jax.Array  # i32[S]
    samples: jax.Array  # bool[S]
    num_tokens: jax.Array  # i32[]
    num_seqs: jax.Array  # i32[]
    num_steps: jax.Array  # i32[]
    sampling: SamplingInputs


@dataclasses.dataclass(frozen=True, slots=True)
class HostBatch:
    """What goes to the device, and whether a request wants more back than its token."""

    packed: np.ndarray
    masks: np.ndarray | None  # i32[S, ceil(V / 32)]; None if every token is allowed to everyone
    has_logprobs: bool
    has_prompt_logprobs: bool


def unpack_batch(packed: jax.Array, masks: jax.Array, layout: BatchLayout) -> DeviceBatch:
    """Inverse of `build_batch`, traced inside the step."""
    a: dict[str, jax.Array] = {}
    for name, (kind, shape) in layout.fields.items():
        value = packed[layout.offsets[name]].reshape(shape)
        a[name] = value != 0 if kind == "bool" else value
    dtypes = {"i": jnp.int32, "f": jnp.float32, "I": jnp.uint32}
    for line, (name, code) in enumerate(ROW_FIELDS.items()):
        a[name] = jax.lax.bitcast_convert_type(a["row_params"][line], dtypes[code])
    a["masks"] = masks
    a["seeds"] = jnp.stack([a["seed_low"], a["seed_high"]], axis=-1)
    sampling_fields = {f.name for f in dataclasses.fields(SamplingInputs)} - {"positions", "extra"}
    sampling = SamplingInputs(
        positions=a["sample_positions"],
        extra=a.get("extra"),
        **{name: a[name] for name in sampling_fields},
    )
    batch_fields = {f.name for f in dataclasses.fields(DeviceBatch)} - {"sampling"}
    return DeviceBatch(sampling=sampling, **{name: a[name] for name in batch_fields})


def build_batch(plan: StepPlan, layout: BatchLayout, mirror: RowMirror) -> HostBatch:
    """Pack a plan for the bucket of `layout`.

    No array operation belongs to one sequence: each costs 0.3 us and more, so that 256 sequences
    took 3 ms. What differs between sequences is gathered in lists, the rest is done for all at
    once.
    """
    scheduled = plan.scheduled
    num_seqs, num_tokens = len(scheduled), plan.tokens_per_step
    packed = np.zeros(layout.size, np.int32)

    def field(name: str) -> np.ndarray:
        return packed[layout.offsets[name]]

    rows = field("rows")
    rows[:num_seqs] = [item.row for item in scheduled]
    rows[num_seqs:] = layout.num_rows
    starts = np.array([item.start for item in scheduled], np.int32)
    is_decode = num_tokens == num_seqs  # one token each
    counts = 1 if is_decode else np.array([item.num_tokens for item in scheduled], np.int32)
    ends = starts + counts
    token_stops = np.cumsum(np.broadcast_to(counts, num_seqs), dtype=np.int32)
    seq_ids = np.repeat(np.arange(num_seqs, dtype=np.int32), counts)
    tokens = slice(0, num_tokens)
    field("token_ids")[tokens] = _decode_ids(scheduled) if is_decode else _token_ids(scheduled)
    # Token t of sequence s stands (token_stops[s] - t) before the sequence's end.
    field("positions")[tokens] = np.arange(num_tokens) + (ends - token_stops)[seq_ids]
    field("seq_ids")[tokens] = seq_ids
    cu_q_lens = field("cu_q_lens")
    cu_q_lens[1 : num_seqs + 1] = token_stops
    cu_q_lens[num_seqs + 1 :] = num_tokens
    field("kv_lens")[:num_seqs] = ends
    field("last_token_index")[:num_seqs] = token_stops - 1
    field("sample_positions")[:num_seqs] = ends
    samples = field("samples")
    samples[:num_seqs] = [item.samples for item in scheduled]
    _fill_pages(field, layout, mirror.new_pages(scheduled))
    params = field("row_params").reshape(-1, layout.num_seqs)
    np.take(mirror.params, rows, axis=1, out=params, mode="clip")
    if layout.num_extra:
        extra = field("extra").reshape(layout.num_seqs, -1)
        np.take(mirror.extra, rows, axis=0, out=extra, mode="clip")
    field("num_tokens")[0], field("num_seqs")[0] = num_tokens, num_seqs
    field("num_steps")[0] = plan.num_steps
    banned = field("banned").reshape(layout.num_seqs, -1)
    banned[:] = layout.vocab_size
    row_flags = mirror.flags[rows[:num_seqs]]
    flags = int(np.bitwise_or.reduce(row_flags * samples[:num_seqs]))
    if flags & RowFlag.BANS and _fill_banned(banned, plan):
        flags |= RowFlag.SPECIAL | RowFlag.ADJUSTED
    masks = None
    if flags & RowFlag.CONSTRAINED:
        flags |= RowFlag.SPECIAL | RowFlag.ADJUSTED
        masks = np.zeros(layout.mask_shape, np.int32)
        field("masked")[:num_seqs] = _fill_masks(masks, scheduled)
    field("any_special")[0] = flags & RowFlag.SPECIAL
    field("any_adjusted")[0] = flags & RowFlag.ADJUSTED
    field("any_truncated")[0] = flags & RowFlag.TRUNCATED
    field("any_logprobs")[0] = flags & RowFlag.LOGPROBS
    return HostBatch(
        packed,
        masks,
        has_logprobs=bool(flags & RowFlag.LOGPROBS),
        has_prompt_logprobs=bool(np.bitwise_or.reduce(row_flags) & RowFlag.PROMPT_LOGPROBS),
    )


def _fill_pages(
    field: Callable[[str], np.ndarray], layout: BatchLayout, new_pages: Sequence[PageUpdates]
) -> None:
    """How the page tables grow. Whole tables would be 8 MB a step for 256 sequences of 128k tokens;
    they lie on the device."""
    slots = field("page_slots").reshape(layout.num_groups, -1)
    ids = field("page_ids").reshape(layout.num_groups, -1)
    # No two slots are equal, those of nobody included: the device need not write them in order.
    slots[:] = np.arange(slots.shape[1]) + layout.num_rows * layout.pages_per_seq
    for group, (group_slots, group_ids) in enumerate(new_pages):
        slots[group, : len(group_slots)] = group_slots
        ids[group, : len(group_ids)] = group_ids


def banned_ids(item: ScheduledRequest, num_steps: int = 1) -> list[int]:
    """Tokens that must not be sampled now: stops before `min_tokens`, and ends of bad words. The
    same ones in all `num_steps` steps."""
    request = item.request
    num_outputs = item.start + item.num_tokens - (num_steps - 1) - request.num_prompt_tokens
    return request.banned_ids(num_outputs)


def _decode_ids(scheduled: Sequence[ScheduledRequest]) -> list[int]:
    """Of one token a sequence."""
    return [
        ids[item.start] if item.start < len(ids := item.request.token_ids) else PENDING
        for item in scheduled
    ]


def _token_ids(scheduled: Sequence[ScheduledRequest]) -> list[int]:
    token_ids: list[int] = []
    for item in scheduled:
        known = item.request.token_ids[item.start : item.start + item.num_tokens]
        token_ids += known
        token_ids += [PENDING] * (item.num_tokens - len(known))
    return token_ids


def _fill_masks(masks_SW: np.ndarray, scheduled: Sequence[ScheduledRequest]) -> list[bool]:
    """Which sequences are bound by theirs."""
    is_masked = []
    for s, item in enumerate(scheduled):
        constraint = item.request.constraint
        mask = constraint.mask if item.samples and constraint is not None else None
        if mask is not None:
            masks_SW[s] = mask
        is_masked.append(mask is not None)
    return is_masked


def _fill_banned(banned_SB: np.ndarray, plan: StepPlan) -> bool:
    """Whether any token is banned in this step."""
    any_banned = False
    for s, item in enumerate(plan.scheduled):
        p = item.request.sampling
        if item.samples and (p.min_tokens or p.bad_word_ids):
            banned = banned_ids(item, plan.num_steps)
            banned_SB[s, : len(banned)] = banned
            any_banned |= bool(banned)
    return any_banned
