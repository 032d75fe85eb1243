"""Triton kernels of ragged paged attention. Imported only where a program for a GPU is traced.

Softmax runs in base 2. `top` is the running maximum, `total` the running sum, `acc` the output
before it is divided by the sum (flash attention, arXiv:2205.14135).

A row's context is one chunk, or several where it is long, cut by its own length (`chunk_of`). Each
chunk is summed by itself, block by block, and chunks are folded in their order: whether one program
reads them all, or several, or a tile of a prompt does, the row has the same bits.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(-1.0e30)  # score of a key that is not seen: finite, so that no NaN arises
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_block(
    kv_ptr,
    table_ptr,  # of this sequence
    at,  # [keys] positions
    is_live,  # [keys]
    offsets_h,  # [HP]
    offsets_v,  # [columns]: of values, all or some
    head,
    K: tl.constexpr,
    H: tl.constexpr,
    B: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Keys [keys, HP] and values [keys, columns] at `at`; zero where not live: unused slots hold
    NaN."""
    page = tl.load(table_ptr + at // B, mask=is_live, other=0).to(tl.int64)
    row = (page * B + at % B) * (2 * K * H) + head * H
    mask = is_live[:, None] & (offsets_h < H)[None, :]
    k = tl.load(kv_ptr + row[:, None] + offsets_h[None, :], mask=mask, other=0.0)
    mask = is_live[:, None] & (offsets_v < H)[None, :]
    v = tl.load(kv_ptr + row[:, None] + offsets_v[None, :] + K * H, mask=mask, other=0.0)
    return k.to(DTYPE), v.to(DTYPE)


@triton.jit
def attend_block(
    q,  # [rows, HP]
    k,  # [keys, HP]
    v,  # [keys, columns]
    is_seen,  # [rows, keys], or None: every row sees every key
    top,
    total,
    acc,  # [rows, columns]
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFT_CAP == 0.0:
        to_log2: tl.constexpr = SCALE * LOG2_E
    else:
        # cap * tanh(s * scale / cap), with tanh(x) = 1 - 2 / (exp(2 x) + 1)
        s = 1.0 - 2.0 / (tl.exp2(s * (2 * SCALE / SOFT_CAP * LOG2_E)) + 1.0)
        to_log2: tl.constexpr = SOFT_CAP * LOG2_E
    return accumulate(s, v, is_seen, top, total, acc, to_log2, PRECISION)


@triton.jit
def accumulate(
    s,  # [rows, keys]: scores
    v,  # [keys, columns]
    is_seen,  # [rows or 1, keys], or None: every row sees every key
    top,
    total,
    acc,
    TO_LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The part of the online softmax that follows the scores."""
    if is_seen is not None:
        s = tl.where(is_seen, s, NEVER)
    new_top = tl.maximum(top, tl.max(s, 1) * TO_LOG2)
    p = tl.exp2(s * TO_LOG2 - new_top[:, None])
    if is_seen is not None:
        p = tl.where(is_seen, p, 0.0)  # a row that has seen nothing yet: exp2(NEVER - NEVER) = 1
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def finish(top, total, acc, sink, HAS_SINKS: tl.constexpr):
    """The output rows. A sink is one more logit in the sum, without a value."""
    if HAS_SINKS:
        top_all = tl.maximum(top, sink * LOG2_E)
        decay = tl.exp2(top - top_all)
        total = total * decay + tl.exp2(sink * LOG2_E - top_all)
        acc = acc * decay[:, None]
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def fold(top, total, acc, chunk_top, chunk_total, chunk_acc, is_folded):
    """Add a chunk to what came before it; where not `is_folded` it stays as it is.

    The rounding of sums is spelled out: kernels must not differ in it.
    """
    new_top = tl.where(is_folded, tl.maximum(top, chunk_top), top)
    before = tl.exp2(top - new_top)
    added = tl.where(is_folded, tl.exp2(chunk_top - new_top), 0.0)
    total = tl.fma(total, before, chunk_total * added)
    acc = tl.fma(acc, tl.broadcast_to(before[:, None], acc.shape), chunk_acc * added[:, None])
    return new_top, total, acc


@triton.jit
def fold_at(end, chunk, all_top, all_total, all_acc, top, total, acc, MIN_CHUNK: tl.constexpr):
    """After a block that ends at `end`: fold the chunks of rows where one ends there, and begin
    afresh. `chunk` is how many positions a row's chunks have.
    """
    if end % MIN_CHUNK == 0:
        is_end = end & (chunk - 1) == 0
        all_top, all_total, all_acc = fold(all_top, all_total, all_acc, top, total, acc, is_end)
        top = tl.where(is_end, NEVER, top)  # what was summed so far weighs nothing any more
    return all_top, all_total, all_acc, top


@triton.jit
def chunk_of(lens, MIN_CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr, DOUBLINGS: tl.constexpr):
    """Positions in a chunk of contexts of these lengths: see `work.chunk_of`."""
    chunk = tl.zeros_like(lens) + MIN_CHUNK
    for doubling in tl.static_range(DOUBLINGS):
        is_more = lens > MAX_CHUNKS * (MIN_CHUNK << doubling)
        chunk = tl.where(is_more, 2 * (MIN_CHUNK << doubling), chunk)
    return chunk


@triton.jit
def decode_chunk(
    q_ptr,  # [T, N, H]
    kv_ptr,  # [P, B, 2, K, H]
    table_ptr,  # i32[S, M]
    token_ptr,  # i32[S + 1]: the token of a sequence
    work_ptr,  # i32[W, 5]: sequence, first position, end, number of the chunk, is it all
    num_work_ptr,  # i32[1]
    sinks_ptr,  # f32[N], or anything
    prior_ptr,  # [T, N, H]: aliased to out where another kernel wrote some of its rows
    # outputs
    out_ptr,  # [T, N, H]; written here for a sequence of one chunk
    acc_ptr,  # f32[S, MAX_CHUNKS, N, H]
    top_ptr,  # f32[S, MAX_CHUNKS, N]
    total_ptr,  # f32[S, MAX_CHUNKS, N]
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,  # H, rounded up to a power of two
    GP: tl.constexpr,  # N // K, rounded up to a power of two and to what the matrix unit takes
    B: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,  # of values, of HP: for each program
    MAX_CHUNKS: tl.constexpr,  # that a context here may have
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32
    NUM_PROGRAMS: tl.constexpr,
):
    """The newest token of a sequence against one chunk of its context, for one KV head.

    Where sequences are few, several programs do the same for other columns of the values: sums
    along the context stay whole, and a column has the same bits.
    """
    G: tl.constexpr = N // K
    SLICES: tl.constexpr = HP // COLUMNS
    DTYPE: tl.constexpr = tl.float32 if WIDE else kv_ptr.dtype.element_ty
    rows = tl.arange(0, GP)
    offsets_h = tl.arange(0, HP)
    is_head = rows < G
    num_items = tl.load(num_work_ptr) * (K * SLICES)
    for item in range(tl.program_id(0), num_items, NUM_PROGRAMS):
        work = work_ptr + item // (K * SLICES) * 5
        head = item // SLICES % K
        offsets_v = item % SLICES * COLUMNS + tl.arange(0, COLUMNS)
        in_tile = is_head[:, None] & (offsets_v < H)[None, :]
        sequence = tl.load(work)
        begin = tl.load(work + 1)
        end = tl.load(work + 2)
        heads = head * G + rows
        row = (tl.load(token_ptr + sequence) * N + heads)[:, None] * H
        in_q = is_head[:, None] & (offsets_h < H)[None, :]
        q = tl.load(q_ptr + row + offsets_h[None, :], mask=in_q, other=0.0).to(DTYPE)
        top = tl.full([GP], NEVER, tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, COLUMNS], tl.float32)
        for start in range(begin // BLOCK * BLOCK, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            is_live = (at >= begin) & (at < end)
            table_at = table_ptr + sequence * M
            k, v = load_block(
                kv_ptr, table_at, at, is_live, offsets_h, offsets_v, head, K, H, B, DTYPE
            )
            is_seen = is_live[None, :]
            top, total, acc = attend_block(
                q, k, v, is_seen, top, total, acc, SCALE, SOFT_CAP, PRECISION
            )
        if tl.load(work + 4) > 0:
            sink = tl.load(sinks_ptr + heads, mask=is_head, other=0.0) if HAS_SINKS else top
            out = finish(top, total, acc, sink, HAS_SINKS)
            out_at = out_ptr + row + offsets_v[None, :]
            tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=in_tile)
        else:
            chunk = (sequence * MAX_CHUNKS + tl.load(work + 3)).to(tl.int64) * N + heads
            tl.store(acc_ptr + chunk[:, None] * H + offsets_v[None, :], acc, mask=in_tile)
            tl.store(top_ptr + chunk, top, mask=is_head)
            tl.store(total_ptr + chunk, total, mask=is_head)


@triton.jit
def fold_chunks(
    acc_ptr,  # f32[S, MAX_CHUNKS, N, H]
    top_ptr,  # f32[S, MAX_CHUNKS, N]
    total_ptr,  # f32[S, MAX_CHUNKS, N]
    chunks_ptr,  # i32[S, 2]: first and end; none: nothing to fold
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
    MAX_CHUNKS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Fold the chunks of a sequence, for the heads of one KV head."""
    G: tl.constexpr = N // K
    sequence = tl.program_id(0)
    first = tl.load(chunks_ptr + sequence * 2)
    end = tl.load(chunks_ptr + sequence * 2 + 1)
    rows = tl.arange(0, GP)
    offsets_h = tl.arange(0, HP)
    heads = tl.program_id(1) * G + rows
    in_tile = (rows < G)[:, None] & (offsets_h < H)[None, :]
    out_offsets = (tl.load(token_ptr + sequence) * N + heads)[:, None] * H + offsets_h[None, :]
    if end > first:
        top = tl.full([GP], NEVER, tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, HP], tl.float32)
        for chunk in range(first, end):
            partial = (sequence * MAX_CHUNKS + chunk).to(tl.int64) * N + heads
            chunk_top = tl.load(top_ptr + partial, mask=rows < G, other=NEVER)
            chunk_total = tl.load(total_ptr + partial, mask=rows < G, other=0.0)
            at = partial[:, None] * H + offsets_h[None, :]
            chunk_acc = tl.load(acc_ptr + at, mask=in_tile, other=0.0)
            top, total, acc = fold(top, total, acc, chunk_top, chunk_total, chunk_acc, rows >= 0)
        sink = tl.load(sinks_ptr + heads, mask=rows < G, other=0.0) if HAS_SINKS else top
        out = finish(top, total, acc, sink, HAS_SINKS)
        tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def attend_tile(
    q_ptr,  # [T, N, H]
    kv_ptr,  # [P, B, 2, K, H]
    table_ptr,  # i32[S, M]
    tiles_ptr,  # i32[W, 4]: sequence, first token, number of queries, position of the first
    num_tiles_ptr,  # i32[1]
    sinks_ptr,  # f32[N], or anything
    prior_ptr,  # [T, N, H]: aliased to out where another kernel wrote some of its rows
    # outputs
    out_ptr,  # [T, N, H]
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    GP: tl.constexpr,  # N // K, rounded up to a power of two
    B: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    IS_LONG: tl.constexpr,  # queries whose contexts have several chunks; else the others
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32
):
    """A tile of consecutive queries of one sequence, for one KV head: row r is query r // GP.

    A second sum for folded chunks takes the registers of half a tile, so that queries are left to
    another launch where it is needed.
    """
    G: tl.constexpr = N // K
    DTYPE: tl.constexpr = tl.float32 if WIDE else kv_ptr.dtype.element_ty
    tile = tl.program_id(0) // K
    head = tl.program_id(0) % K
    if tile >= tl.load(num_tiles_ptr):
        return
    sequence = tl.load(tiles_ptr + tile * 4)
    first_token = tl.load(tiles_ptr + tile * 4 + 1)
    num_queries = tl.load(tiles_ptr + tile * 4 + 2)
    first_position = tl.load(tiles_ptr + tile * 4 + 3)
    if IS_LONG:
        if first_position + num_queries <= MIN_CHUNK:
            return
    elif first_position >= MIN_CHUNK:
        return
    rows = tl.arange(0, ROWS)
    offsets_h = tl.arange(0, HP)
    position = first_position + rows // GP
    is_row = (rows // GP < num_queries) & (rows % GP < G) & ((position >= MIN_CHUNK) == IS_LONG)
    in_tile = is_row[:, None] & (offsets_h < H)[None, :]
    heads = head * G + rows % GP
    q_offsets = ((first_token + rows // GP) * N + heads)[:, None] * H + offsets_h[None, :]
    q = tl.load(q_ptr + q_offsets, mask=in_tile, other=0.0).to(DTYPE)
    end = first_position + num_queries
    if not IS_LONG:
        end = tl.minimum(end, MIN_CHUNK)
    begin = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK * BLOCK if WINDOW > 0 else 0
    # Blocks before `masked` are seen whole by every row.
    masked = begin if WINDOW > 0 else (first_position + 1) // BLOCK * BLOCK
    table_ptr += sequence * M
    top = tl.full([ROWS], NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HP], tl.float32)
    if IS_LONG:
        chunk = chunk_of(position + 1, MIN_CHUNK, MAX_CHUNKS, DOUBLINGS)
        all_top = tl.full([ROWS], NEVER, tl.float32)
        all_total = tl.zeros([ROWS], tl.float32)
        all_acc = tl.zeros([ROWS, HP], tl.float32)
    for start in range(begin, masked, BLOCK):
        at = start + tl.arange(0, BLOCK)
        k, v = load_block(
            kv_ptr, table_ptr, at, at >= 0, offsets_h, offsets_h, head, K, H, B, DTYPE
        )
        top, total, acc = attend_block(q, k, v, None, top, total, acc, SCALE, SOFT_CAP, PRECISION)
        if IS_LONG:
            all_top, all_total, all_acc, top = fold_at(
                start + BLOCK, chunk, all_top, all_total, all_acc, top, total, acc, MIN_CHUNK
            )
    for start in range(masked, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_live = at < end
        if WINDOW > 0:
            is_live = is_live & (at > first_position - WINDOW)
        k, v = load_block(
            kv_ptr, table_ptr, at, is_live, offsets_h, offsets_h, head, K, H, B, DTYPE
        )
        is_seen = at[None, :] <= position[:, None]
        if WINDOW > 0:
            is_seen = is_seen & (at[None, :] > position[:, None] - WINDOW)
        top, total, acc = attend_block(
            q, k, v, is_seen, top, total, acc, SCALE, SOFT_CAP, PRECISION
        )
        if IS_LONG:
            all_top, all_total, all_acc, top = fold_at(
                start + BLOCK, chunk, all_top, all_total, all_acc, top, total, acc, MIN_CHUNK
            )
    if IS_LONG:
        top, total, acc = fold(all_top, all_total, all_acc, top, total, acc, rows >= 0)
    sink = tl.load(sinks_ptr + heads, mask=is_row, other=0.0) if HAS_SINKS else top
    out = finish(top, total, acc, sink, HAS_SINKS)
    tl.store(out_ptr + q_offsets, out.to(out_ptr.dtype.element_ty), mask=in_tile)
