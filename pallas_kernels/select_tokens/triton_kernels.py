"""Triton kernels of `select_tokens`. Imported only where a program for a GPU is traced.

Scores become ranks, unsigned numbers in the same order and never 0, and wait in memory. Of a row of
ranks the k-th best is found as the reference does: bit by bit, from the highest one down, by
counting. A program holds all ranks that it counts in registers.
"""

import triton
import triton.language as tl


@triton.jit
def score_queries(
    q_ptr,  # [T, J, X]
    weights_ptr,  # f32[T, J]
    pages_ptr,  # [P, B, ROW]: keys are the last X values of an entry
    table_ptr,  # i32[S, M]
    tiles_ptr,  # i32[W, 4]: sequence, first token, number of tokens, position of the first
    # outputs
    ranks_ptr,  # u32[W * QUERIES, LENGTH]
    J: tl.constexpr,
    JP: tl.constexpr,  # J, rounded up to a power of two
    X: tl.constexpr,
    XP: tl.constexpr,
    ROW: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    LENGTH: tl.constexpr,
    TOKENS_PER_ENTRY: tl.constexpr,
    TOP_K: tl.constexpr,
    QUERIES: tl.constexpr,  # of a tile
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # programs of a tile; they take turns in its blocks of keys
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32
):
    """Consecutive queries of one sequence against some of its keys, if there is a choice."""
    DTYPE: tl.constexpr = tl.float32 if WIDE else q_ptr.dtype.element_ty
    tile = tl.program_id(0)
    sequence = tl.load(tiles_ptr + tile * 4)
    token = tl.load(tiles_ptr + tile * 4 + 1).to(tl.int64)
    count = tl.load(tiles_ptr + tile * 4 + 2)
    # Of the last query; what earlier ones may not see is scored in vain.
    end = (tl.load(tiles_ptr + tile * 4 + 3) + count) // TOKENS_PER_ENTRY
    if (count == 0) | (end <= TOP_K):
        return
    x = tl.arange(0, XP)[None, :]
    j = tl.arange(0, JP)
    q_at = q_ptr + j[:, None] * X + x
    is_q = (j < J)[:, None] & (x < X)
    first_q = tl.load(q_at + token * (J * X), mask=is_q, other=0.0).to(DTYPE)
    first_weights = tl.load(weights_ptr + token * J + j, mask=j < J, other=0.0)
    for block in range(tl.program_id(1), tl.cdiv(end, BLOCK), PARTS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        is_live = at < end
        page = tl.load(table_ptr + sequence * M + at // B, mask=is_live, other=0).to(tl.int64)
        key_at = (page * B + at % B) * ROW + (ROW - X)
        is_key = is_live[:, None] & (x < X)
        keys = tl.load(pages_ptr + key_at[:, None] + x, mask=is_key, other=0.0).to(DTYPE)
        ranks_at = ranks_ptr + tile * QUERIES * LENGTH + at
        if QUERIES == 1:
            ranks = score(keys, first_q, first_weights, SCALE, PRECISION)
            tl.store(ranks_at, ranks, mask=is_live)
        else:
            for i in range(count):
                row = token + i
                q = tl.load(q_at + row * (J * X), mask=is_q, other=0.0).to(DTYPE)
                weights = tl.load(weights_ptr + row * J + j, mask=j < J, other=0.0)
                ranks = score(keys, q, weights, SCALE, PRECISION)
                tl.store(ranks_at + i * LENGTH, ranks, mask=is_live)


@triton.jit
def score(
    keys,  # [keys, XP]
    q,  # [JP, XP]
    weights,  # [JP]
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u32[keys]. Keys are the rows of the product, so that a key's heads are added up by the few
    threads that hold them."""
    s = tl.dot(keys, tl.trans(q), input_precision=PRECISION)
    scores = tl.sum(tl.maximum(s * SCALE, 0.0) * weights[None, :], 1)
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.uint32, bitcast=True)  # -0 equals 0
    return bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000)


@triton.jit
def choose_of_chunks(
    ranks_ptr,  # u32[W * QUERIES, LENGTH]
    table_ptr,  # i32[S, M]
    tiles_ptr,  # i32[W, 4]
    prior_ptr,  # i32[T, TOP_K]: aliased to slots where other tiles' are there, or anything
    # outputs
    slots_ptr,  # i32[T, TOP_K]; written here where there is one chunk
    best_ranks_ptr,  # u32[W * QUERIES, CHUNKS, TOP_K], or anything: 0 behind the last
    best_ptr,  # i32 of the same shape: their positions
    B: tl.constexpr,
    M: tl.constexpr,
    LENGTH: tl.constexpr,
    TOKENS_PER_ENTRY: tl.constexpr,
    TOP_K: tl.constexpr,
    KP: tl.constexpr,  # TOP_K, rounded up to a power of two
    QUERIES: tl.constexpr,
    CHUNK: tl.constexpr,  # a power of two
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,  # ranks that are placed at a time
):
    """The best positions of one chunk of a query's context, in order."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    sequence = tl.load(tiles_ptr + row // QUERIES * 4)
    token = tl.load(tiles_ptr + row // QUERIES * 4 + 1) + row % QUERIES
    if row % QUERIES >= tl.load(tiles_ptr + row // QUERIES * 4 + 2):
        return
    position = tl.load(tiles_ptr + row // QUERIES * 4 + 3) + row % QUERIES
    length = (position + 1) // TOKENS_PER_ENTRY
    table_ptr += sequence * M
    slots_ptr += token.to(tl.int64) * TOP_K
    place = tl.arange(0, KP)
    if length <= TOP_K:  # all of them
        if chunk == 0:
            page = tl.load(table_ptr + place // B, mask=place < length, other=0)
            slot = tl.where(place < length, page * B + place % B, -1)
            tl.store(slots_ptr + place, slot, mask=place < TOP_K)
        return
    if chunk * CHUNK >= length:
        return
    ranks_ptr += row * LENGTH + chunk * CHUNK
    length = tl.minimum(length - chunk * CHUNK, CHUNK)
    worst, num_equal = find_worst(ranks_ptr, length, TOP_K, CHUNK)
    num_above, num_found = 0, 0
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ranks = tl.load(ranks_ptr + at, mask=at < length, other=0)
        is_taken, column, num_above, num_found = place_best(
            ranks, worst, num_equal, num_above, num_found
        )
        if CHUNKS == 1:
            page = tl.load(table_ptr + at // B, mask=is_taken, other=0)
            tl.store(slots_ptr + column, page * B + at % B, mask=is_taken)
        else:
            nominated = (row * CHUNKS + chunk) * TOP_K + column
            tl.store(best_ranks_ptr + nominated, ranks, mask=is_taken)
            tl.store(best_ptr + nominated, chunk * CHUNK + at, mask=is_taken)
    if CHUNKS > 1:
        is_rest = (place >= length) & (place < TOP_K)  # of a chunk of less than k
        nothing = tl.zeros([KP], tl.uint32)
        tl.store(best_ranks_ptr + (row * CHUNKS + chunk) * TOP_K + place, nothing, mask=is_rest)


@triton.jit
def choose_of_best(
    best_ranks_ptr,  # u32[W * QUERIES, CHUNKS, TOP_K]
    best_ptr,  # i32[W * QUERIES, CHUNKS, TOP_K]
    table_ptr,  # i32[S, M]
    tiles_ptr,  # i32[W, 4]
    prior_ptr,  # i32[T, TOP_K]: aliased to slots
    # outputs
    slots_ptr,  # i32[T, TOP_K]
    B: tl.constexpr,
    M: tl.constexpr,
    TOKENS_PER_ENTRY: tl.constexpr,
    TOP_K: tl.constexpr,
    QUERIES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,  # CHUNKS * TOP_K, rounded up to a power of two
    BLOCK: tl.constexpr,
):
    """The best of the best of a query's chunks: whoever is taken was among its own chunk's."""
    row = tl.program_id(0)
    sequence = tl.load(tiles_ptr + row // QUERIES * 4)
    token = tl.load(tiles_ptr + row // QUERIES * 4 + 1) + row % QUERIES
    if row % QUERIES >= tl.load(tiles_ptr + row // QUERIES * 4 + 2):
        return
    position = tl.load(tiles_ptr + row // QUERIES * 4 + 3) + row % QUERIES
    length = (position + 1) // TOKENS_PER_ENTRY
    if length <= TOP_K:
        return
    best_ranks_ptr += row * (CHUNKS * TOP_K)
    best_ptr += row * (CHUNKS * TOP_K)
    num_best = tl.cdiv(length, CHUNK) * TOP_K
    worst, num_equal = find_worst(best_ranks_ptr, num_best, TOP_K, CANDIDATES)
    num_above, num_found = 0, 0
    for start in range(0, num_best, BLOCK):
        candidate = start + tl.arange(0, BLOCK)
        ranks = tl.load(best_ranks_ptr + candidate, mask=candidate < num_best, other=0)
        is_taken, column, num_above, num_found = place_best(
            ranks, worst, num_equal, num_above, num_found
        )
        at = tl.load(best_ptr + candidate, mask=is_taken, other=0)
        page = tl.load(table_ptr + sequence * M + at // B, mask=is_taken, other=0)
        slots_at = slots_ptr + token.to(tl.int64) * TOP_K + column
        tl.store(slots_at, page * B + at % B, mask=is_taken)


@triton.jit
def find_worst(
    ranks_ptr,
    length,
    K: tl.constexpr,
    SIZE: tl.constexpr,  # a power of two, at least `length`
):
    """(the K-th largest rank, how many that equal it are among the K largest); (0, K) where there
    are not more than K. Ranks of 0 do not count."""
    at = tl.arange(0, SIZE)
    ranks = tl.load(ranks_ptr + at, mask=at < length, other=0)
    reached = tl.sum((ranks > 0).to(tl.int32), 0)
    worst = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    while (reached > K) & (bit > 0):
        higher = worst | bit
        count = tl.sum((ranks >= higher).to(tl.int32), 0)
        worst = tl.where(count >= K, higher, worst)
        reached = tl.where(count >= K, count, reached)
        bit = bit >> 1
    return worst, K - tl.sum((ranks > worst).to(tl.int32), 0)


@triton.jit
def place_best(
    ranks,  # u32[BLOCK]
    worst,
    num_equal,
    num_above,  # in earlier blocks: ranks above the worst
    num_found,  # and ranks that equal it
):
    """(whether each is among the best, which of them it is; both numbers after this block)."""
    is_above = ranks > worst
    is_equal = (ranks == worst) & (ranks > 0)
    counted = is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16)
    order = tl.cumsum(counted, 0)
    above = num_above + (order & 0xFFFF)
    found = num_found + (order >> 16)
    is_taken = is_above | (is_equal & (found <= num_equal))
    total = tl.sum(counted, 0)
    return (
        is_taken,
        above + tl.minimum(found, num_equal) - 1,
        num_above + (total & 0xFFFF),
        num_found + (total >> 16),
    )
