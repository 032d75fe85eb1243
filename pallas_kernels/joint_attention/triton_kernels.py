"""Triton kernels of `joint_attention` and `sparse_mla_attention`. Imported only where a program for
a GPU is traced.

A program has some heads of one token, which are the rows of its products, and a share of the blocks
of the token's slots: those of the first cache, then those of the second.
"""

import triton
import triton.language as tl

from jengine.pallas_kernels.ragged_paged_attention.triton_kernels import (
    LOG2_E,
    NEVER,
    accumulate,
    finish,
)


@triton.jit
def attend_slots(
    q,  # [HEADS, EP]
    q_rest,  # [HEADS, RP], or anything
    pages_ptr,  # [slots, ROW]
    slots_ptr,  # of this token
    first,
    end,  # slots of the token to attend to, the first one a block's
    top,
    total,
    acc,
    E: tl.constexpr,
    EP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    TO_LOG2: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The softmax over these slots as well. Nothing is read behind `end`."""
    e = tl.arange(0, EP)[None, :]
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_live = at < end
        slot = tl.load(slots_ptr + at, mask=is_live, other=0).to(tl.int64)
        entries = tl.load(
            pages_ptr + (slot * ROW)[:, None] + e, mask=is_live[:, None] & (e < E), other=0.0
        ).to(DTYPE)
        s = tl.dot(q, tl.trans(entries), input_precision=PRECISION)
        if R > 0:
            r = tl.arange(0, RP)[None, :]
            rest = tl.load(
                pages_ptr + (slot * ROW)[:, None] + E + r,
                mask=is_live[:, None] & (r < R),
                other=0.0,
            ).to(DTYPE)
            s = tl.dot(q_rest, tl.trans(rest), s, input_precision=PRECISION)
        top, total, acc = accumulate(
            s, entries, is_live[None, :], top, total, acc, TO_LOG2, PRECISION
        )
    return top, total, acc


@triton.jit
def attend_token(
    q_ptr,  # [T, N, E + R]
    first_pages_ptr,  # [slots, FIRST_ROW]
    first_slots_ptr,  # i32[T, FIRST_WIDTH]
    first_counts_ptr,  # i32[T]: slots in use
    second_pages_ptr,  # [slots, SECOND_ROW], or anything
    second_slots_ptr,  # i32[T, SECOND_WIDTH], or anything
    second_counts_ptr,  # i32[T]
    sinks_ptr,  # f32[N], or anything
    # outputs
    out_ptr,  # [T, N, E]; written where there is one split
    acc_ptr,  # f32[T, SPLITS, N, E]; written where there are several, as the next two
    top_ptr,  # f32[T, SPLITS, N]
    total_ptr,  # f32[T, SPLITS, N]: 0 of a split without slots, whose `acc` is not written
    N: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,  # E, rounded up to a power of two
    R: tl.constexpr,  # what a key has behind its value
    RP: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    FIRST_ROW: tl.constexpr,
    FIRST_WIDTH: tl.constexpr,
    SECOND_ROW: tl.constexpr,
    SECOND_WIDTH: tl.constexpr,  # 0: there is no second cache
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,  # of a split
    HAS_SINKS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32
):
    """Some heads of a token over one split of its slots. How they are split depends on their
    number and on SPLITS alone."""
    DTYPE: tl.constexpr = tl.float32 if WIDE else q_ptr.dtype.element_ty
    TO_LOG2: tl.constexpr = SCALE * LOG2_E
    TILES: tl.constexpr = (N + HEADS - 1) // HEADS
    token = tl.program_id(0) // TILES
    first_head = tl.program_id(0) % TILES * HEADS
    heads = first_head + tl.arange(0, HEADS)
    split = tl.program_id(1)
    e = tl.arange(0, EP)[None, :]
    is_head = heads < N
    in_tile = is_head[:, None] & (e < E)
    first_count = tl.load(first_counts_ptr + token)
    second_count = tl.load(second_counts_ptr + token) if SECOND_WIDTH > 0 else 0
    first_blocks = tl.cdiv(first_count, BLOCK)
    num_blocks = first_blocks + tl.cdiv(second_count, BLOCK)
    share = tl.maximum(tl.cdiv(num_blocks, SPLITS), MIN_BLOCKS)
    begin = split * share
    end = tl.minimum(begin + share, num_blocks)
    # Few enough for 32 bits: with all their heads they fill the device once.
    partial = (token * SPLITS + split) * N + heads
    if SPLITS > 1:  # noqa: SIM102
        if begin >= num_blocks:
            tl.store(top_ptr + partial, tl.full([HEADS], NEVER, tl.float32), mask=is_head)
            tl.store(total_ptr + partial, tl.zeros([HEADS], tl.float32), mask=is_head)
            return
    of_tile = token.to(tl.int64) * N + first_head
    nth = tl.arange(0, HEADS)[:, None]
    q_at = q_ptr + of_tile * (E + R) + nth * (E + R)
    q = tl.load(q_at + e, mask=in_tile, other=0.0).to(DTYPE)
    q_rest = q
    if R > 0:
        r = tl.arange(0, RP)[None, :]
        q_rest = tl.load(q_at + E + r, mask=is_head[:, None] & (r < R), other=0.0).to(DTYPE)
    top = tl.full([HEADS], NEVER, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, EP], tl.float32)
    top, total, acc = attend_slots(
        q, q_rest, first_pages_ptr, first_slots_ptr + token.to(tl.int64) * FIRST_WIDTH,
        begin * BLOCK, tl.minimum(end * BLOCK, first_count), top, total, acc,
        E, EP, R, RP, FIRST_ROW, BLOCK, TO_LOG2, DTYPE, PRECISION,
    )  # fmt: skip
    if SECOND_WIDTH > 0:
        top, total, acc = attend_slots(
            q, q_rest, second_pages_ptr, second_slots_ptr + token.to(tl.int64) * SECOND_WIDTH,
            (tl.maximum(begin, first_blocks) - first_blocks) * BLOCK,
            tl.minimum((end - first_blocks) * BLOCK, second_count), top, total, acc,
            E, EP, R, RP, SECOND_ROW, BLOCK, TO_LOG2, DTYPE, PRECISION,
        )  # fmt: skip
    if SPLITS == 1:
        sink = tl.load(sinks_ptr + heads, mask=is_head, other=0.0) if HAS_SINKS else top
        out = finish(top, total, acc, sink, HAS_SINKS).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + of_tile * E + nth * E + e, out, mask=in_tile)
    else:
        tl.store(acc_ptr + partial[:, None] * E + e, acc, mask=in_tile)
        tl.store(top_ptr + partial, top, mask=is_head)
        tl.store(total_ptr + partial, total, mask=is_head)


@triton.jit
def add_up_splits(
    acc_ptr,  # f32[T, SPLITS, N, E]
    top_ptr,  # f32[T, SPLITS, N]
    total_ptr,  # f32[T, SPLITS, N]
    sinks_ptr,  # f32[N], or anything
    # outputs
    out_ptr,  # [T, N, E]
    N: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_P: tl.constexpr,  # rounded up to a power of two
    CHUNK: tl.constexpr,  # splits read at once
    HAS_SINKS: tl.constexpr,
):
    """The splits of one head of a token, always in the same order."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    first = token.to(tl.int64) * SPLITS
    splits = tl.arange(0, SPLITS_P)
    of_split = (first + splits) * N + head
    tops = tl.load(top_ptr + of_split, mask=splits < SPLITS, other=NEVER)
    totals = tl.load(total_ptr + of_split, mask=splits < SPLITS, other=0.0)
    top = tl.max(tops, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head) * LOG2_E
        top = tl.maximum(top, sink)
    total = tl.sum(totals * tl.exp2(tops - top), 0)
    if HAS_SINKS:
        total += tl.exp2(sink - top)
    used = tl.sum((totals > 0.0).to(tl.int32), 0)  # they come first
    e = tl.arange(0, EP)
    acc = tl.zeros([EP], tl.float32)
    for start in range(0, used, CHUNK):
        split = start + tl.arange(0, CHUNK)
        at = (first + split) * N + head
        is_used = split < used
        weight = tl.exp2(tl.load(top_ptr + at, mask=is_used, other=NEVER) - top)
        parts = tl.load(
            acc_ptr + at[:, None] * E + e[None, :],
            mask=is_used[:, None] & (e < E)[None, :],
            other=0.0,
        )
        acc += tl.sum(parts * weight[:, None], 0)
    out_at = out_ptr + (token.to(tl.int64) * N + head) * E + e
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=e < E)
