"""Triton kernels of attention over latents. Imported only where a program for a GPU is traced.

As those of `ragged_paged_attention`, which plans and completes their work; a key is a latent and a
rotated part behind it, and the latent is the value as well: it is loaded once for both.
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
def attend_latents(
    q_latent,  # [rows, CP]
    q_rope,  # [rows, RP]
    pages_ptr,  # [P, B, C + R]
    table_ptr,  # of this sequence
    at,  # [keys] positions
    is_live,  # [keys]
    is_seen,  # [rows or 1, keys]
    top,
    total,
    acc,
    C: tl.constexpr,
    CP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    B: tl.constexpr,
    SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax. Slots that are not live hold NaN, and read as zero."""
    page = tl.load(table_ptr + at // B, mask=is_live, other=0).to(tl.int64)
    row = ((page * B + at % B) * (C + R))[:, None]
    c = tl.arange(0, CP)[None, :]
    r = tl.arange(0, RP)[None, :]
    latent = tl.load(pages_ptr + row + c, mask=is_live[:, None] & (c < C), other=0.0).to(DTYPE)
    rope = tl.load(pages_ptr + row + C + r, mask=is_live[:, None] & (r < R), other=0.0).to(DTYPE)
    s = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION)
    s = tl.dot(q_rope, tl.trans(rope), s, input_precision=PRECISION)
    return accumulate(s, latent, is_seen, top, total, acc, SCALE * LOG2_E, PRECISION)


@triton.jit
def decode_latent_split(
    q_ptr,  # [T, N, C + R]
    pages_ptr,  # [P, B, C + R]
    table_ptr,  # i32[S, M]
    token_ptr,  # i32[S + 1]: the token of a sequence
    work_ptr,  # i32[W, 4]: sequence, first position, end, number of splits of the sequence
    num_work_ptr,  # i32[1]
    prior_ptr,  # [T, N, C]: aliased to out where another kernel wrote some of its rows
    # outputs
    out_ptr,  # [T, N, C]; written here for a sequence of one split
    acc_ptr,  # f32[W, N, C]
    top_ptr,  # f32[W, N]
    total_ptr,  # f32[W, N]
    N: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,  # C, rounded up to a power of two
    R: tl.constexpr,
    RP: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    B: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32
    NUM_PROGRAMS: tl.constexpr,
):
    """The newest token of a sequence against one split of its context, for some heads."""
    DTYPE: tl.constexpr = tl.float32 if WIDE else pages_ptr.dtype.element_ty
    TILES: tl.constexpr = (N + HEADS - 1) // HEADS
    c = tl.arange(0, CP)[None, :]
    r = tl.arange(0, RP)[None, :]
    num_items = tl.load(num_work_ptr) * TILES
    for item in range(tl.program_id(0), num_items, NUM_PROGRAMS):
        work = item // TILES
        heads = item % TILES * HEADS + tl.arange(0, HEADS)
        is_head = heads < N
        sequence = tl.load(work_ptr + work * 4)
        begin = tl.load(work_ptr + work * 4 + 1)
        end = tl.load(work_ptr + work * 4 + 2)
        num_splits = tl.load(work_ptr + work * 4 + 3)
        row = (tl.load(token_ptr + sequence) * N + heads)[:, None]
        q_at = q_ptr + row * (C + R)
        q_latent = tl.load(q_at + c, mask=is_head[:, None] & (c < C), other=0.0).to(DTYPE)
        q_rope = tl.load(q_at + C + r, mask=is_head[:, None] & (r < R), other=0.0).to(DTYPE)
        top = tl.full([HEADS], NEVER, tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        acc = tl.zeros([HEADS, CP], tl.float32)
        for start in range(begin // BLOCK * BLOCK, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            is_live = (at >= begin) & (at < end)
            top, total, acc = attend_latents(
                q_latent, q_rope, pages_ptr, table_ptr + sequence * M, at, is_live,
                is_live[None, :], top, total, acc, C, CP, R, RP, B, SCALE, DTYPE, PRECISION,
            )  # fmt: skip
        in_tile = is_head[:, None] & (c < C)
        if num_splits == 1:
            out = finish(top, total, acc, top, False)
            tl.store(out_ptr + row * C + c, out.to(out_ptr.dtype.element_ty), mask=in_tile)
        else:
            partial = work * N + heads
            tl.store(acc_ptr + partial[:, None] * C + c, acc, mask=in_tile)
            tl.store(top_ptr + partial, top, mask=is_head)
            tl.store(total_ptr + partial, total, mask=is_head)


@triton.jit
def attend_latent_tile(
    q_ptr,  # [T, N, C + R]
    pages_ptr,  # [P, B, C + R]
    table_ptr,  # i32[S, M]
    tiles_ptr,  # i32[W, 4]: sequence, first token, number of queries, position of the first
    num_tiles_ptr,  # i32[1]
    token_ptr,  # i32[S + 1]: the first token of a sequence
    # outputs
    out_ptr,  # [T, N, C]
    lse_ptr,  # f32[T, N]: log2 of the sum
    N: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    B: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32
    EARLIER_ONLY: tl.constexpr,  # leave out the tokens of this step
):
    """A tile of consecutive queries of one sequence, for some heads: row r is query r // HEADS."""
    DTYPE: tl.constexpr = tl.float32 if WIDE else pages_ptr.dtype.element_ty
    TILES: tl.constexpr = (N + HEADS - 1) // HEADS
    tile = tl.program_id(0) // TILES
    if tile >= tl.load(num_tiles_ptr):
        return
    sequence = tl.load(tiles_ptr + tile * 4)
    first_token = tl.load(tiles_ptr + tile * 4 + 1)
    num_queries = tl.load(tiles_ptr + tile * 4 + 2)
    first_position = tl.load(tiles_ptr + tile * 4 + 3)
    rows = tl.arange(0, ROWS)
    heads = tl.program_id(0) % TILES * HEADS + rows % HEADS
    is_row = (rows // HEADS < num_queries) & (heads < N)
    c = tl.arange(0, CP)[None, :]
    r = tl.arange(0, RP)[None, :]
    row = ((first_token + rows // HEADS) * N + heads).to(tl.int64)[:, None]
    q_at = q_ptr + row * (C + R)
    q_latent = tl.load(q_at + c, mask=is_row[:, None] & (c < C), other=0.0).to(DTYPE)
    q_rope = tl.load(q_at + C + r, mask=is_row[:, None] & (r < R), other=0.0).to(DTYPE)
    position = first_position + rows // HEADS
    end = first_position + num_queries
    if EARLIER_ONLY:
        end = first_position - (first_token - tl.load(token_ptr + sequence))
    top = tl.full([ROWS], NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, CP], tl.float32)
    for start in range(0, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_live = at < end
        top, total, acc = attend_latents(
            q_latent, q_rope, pages_ptr, table_ptr + sequence * M, at, is_live,
            is_live[None, :] & (at[None, :] <= position[:, None]), top, total, acc,
            C, CP, R, RP, B, SCALE, DTYPE, PRECISION,
        )  # fmt: skip
    out = finish(top, total, acc, top, False)
    in_tile = is_row[:, None] & (c < C)
    at = (first_token + rows // HEADS) * N + heads
    tl.store(
        lse_ptr + at,
        tl.where(total > 0.0, top + tl.log2(tl.maximum(total, 1e-30)), NEVER),
        mask=is_row,
    )
    tl.store(out_ptr + row * C + c, out.to(out_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def combine_splits(
    acc_ptr,  # f32[W, N, H]
    top_ptr,  # f32[W, N]
    total_ptr,  # f32[W, N]
    first_ptr,  # i32[S + 1]: first work item of a sequence
    token_ptr,  # i32[S + 1]
    sinks_ptr,  # f32[N], or anything
    partial_ptr,  # [T, N, H], becomes out
    # outputs
    out_ptr,  # [T, N, H]
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    GP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,  # splits read at once
    IS_DECODE: tl.constexpr,  # rows without work are padding, and become zero
    HAS_SINKS: tl.constexpr,
):
    """Add up the splits of a sequence, always in the same order, for the heads of one KV head."""
    G: tl.constexpr = N // K
    sequence = tl.program_id(0)
    first = tl.load(first_ptr + sequence)
    num_splits = tl.load(first_ptr + sequence + 1) - first
    rows = tl.arange(0, GP)
    offsets_h = tl.arange(0, HP)
    heads = tl.program_id(1) * G + rows
    in_tile = (rows < G)[:, None] & (offsets_h < H)[None, :]
    # In a decode step sequence s is token s, padding included: `token_ptr` ends with the last one.
    token = sequence if IS_DECODE else tl.load(token_ptr + sequence)
    out_offsets = (token * N + heads)[:, None] * H + offsets_h[None, :]
    if num_splits > 1:
        splits = tl.arange(0, MAX_SPLITS)
        at = (first + splits)[:, None] * N + heads[None, :]
        is_split = (splits < num_splits)[:, None] & (rows < G)[None, :]
        top = tl.max(tl.load(top_ptr + at, mask=is_split, other=NEVER), 0)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, HP], tl.float32)
        for chunk in range(0, num_splits, CHUNK):
            split = chunk + tl.arange(0, CHUNK)
            partial = (first + split)[:, None] * N + heads[None, :]
            is_part = (split < num_splits)[:, None] & (rows < G)[None, :]
            weight = tl.exp2(tl.load(top_ptr + partial, mask=is_part, other=NEVER) - top[None, :])
            totals = tl.load(total_ptr + partial, mask=is_part, other=0.0)
            parts = tl.load(
                acc_ptr + partial[:, :, None] * H + offsets_h[None, None, :],
                mask=is_part[:, :, None] & (offsets_h < H)[None, None, :],
                other=0.0,
            )
            total += tl.sum(totals * weight, 0)
            acc += tl.sum(parts * weight[:, :, None], 0)
        sink = tl.load(sinks_ptr + heads, mask=rows < G, other=0.0) if HAS_SINKS else top
        out = finish(top, total, acc, sink, HAS_SINKS)
        tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=in_tile)
    if IS_DECODE:  # noqa: SIM102
        if num_splits == 0:
            zero = tl.zeros([GP, HP], tl.float32)
            tl.store(out_ptr + out_offsets, zero.to(out_ptr.dtype.element_ty), mask=in_tile)
