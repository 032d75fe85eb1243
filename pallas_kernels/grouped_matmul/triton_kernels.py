"""The Triton kernels of `expert_parts`. Imported only where a program for a GPU is traced.

A pair is a token at one of its experts: pair p is token p // TOP_K. Pairs are taken in the order of
their experts, and that order is cut into tiles of one expert each.
"""

import triton
import triton.language as tl

from jengine.pallas_kernels.packed_kernels import dot_packed


@triton.jit
def plan_experts(
    ids_ptr,  # i32[M]: the expert of each pair; E: none
    num_tokens_ptr,  # i32[1]
    # outputs
    order_ptr,  # i32[M]: pairs in the order of experts, within an expert as they came
    tiles_ptr,  # i32[G, 3]: expert, first place in that order, place after the last
    num_tiles_ptr,  # i32[1]
    M: tl.constexpr,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,  # a power of two above E
    ROWS: tl.constexpr,  # of a tile
    TILES: tl.constexpr,  # most of one expert, rounded up to a power of two
    CHUNK: tl.constexpr,
):
    """One program for each expert. All of them count all pairs: nobody waits for anybody."""
    expert = tl.program_id(0)
    num_pairs = tl.load(num_tokens_ptr) * TOP_K
    bins = tl.arange(0, EP)
    counts = tl.zeros([EP], tl.int32)
    for start in range(0, M, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=EP - 1)
        counts += tl.histogram(ids, EP)
    tiles_of = (counts + ROWS - 1) // ROWS
    before = bins < expert
    place = tl.sum(tl.where(before, counts, 0))
    count = tl.sum(tl.where(bins == expert, counts, 0))
    first_tile = tl.sum(tl.where(before, tiles_of, 0))
    num_tiles = (count + ROWS - 1) // ROWS
    tile = tl.arange(0, TILES)
    at = tiles_ptr + (first_tile + tile) * 3
    is_tile = tile < num_tiles
    tl.store(at, tl.zeros([TILES], tl.int32) + expert, mask=is_tile)
    tl.store(at + 1, place + tile * ROWS, mask=is_tile)
    tl.store(at + 2, place + tl.minimum((tile + 1) * ROWS, count), mask=is_tile)
    if expert == E - 1:
        tl.store(num_tiles_ptr, first_tile + num_tiles)
    if count > 0:
        for start in range(0, M, CHUNK):
            pair = start + tl.arange(0, CHUNK)
            is_ours = (tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1) == expert).to(
                tl.int32
            )
            tl.store(order_ptr + place + tl.cumsum(is_ours, 0) - 1, pair, mask=is_ours > 0)
            place += tl.sum(is_ours)


@triton.jit
def within(is_row, start, DEPTH: tl.constexpr, BK: tl.constexpr):
    """The mask of a tile of rows. Only the last tile may end past the depth."""
    if DEPTH % BK == 0:
        mask = is_row[:, None]
    else:
        mask = is_row[:, None] & (start + tl.arange(0, BK) < DEPTH)[None, :]
    return mask


@triton.jit
def gate_up_of_experts(
    x_ptr,  # [T, D]
    w_ptr,  # [E, 2 F, D]: gate above up; or its codes
    scales_ptr,  # of codes; else anything
    bias_ptr,  # [E, 2 F], or anything
    order_ptr,  # i32[M]
    tiles_ptr,  # i32[G, 3]
    num_tiles_ptr,  # i32[1]
    # outputs
    out_ptr,  # [M, F], in the order of `order`
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    BF: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    CODES: tl.constexpr,  # "": the weights are an array
    HAS_BIAS: tl.constexpr,
    ALPHA: tl.constexpr,  # 0: SwiGLU; else `ClampedSwiGLU`
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of [BF weights of gate and of up, ROWS pairs]: weights are the rows of the matrix
    unit."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    TILES_F: tl.constexpr = (F + BF - 1) // BF
    tile = tl.program_id(0) // TILES_F
    if tile >= tl.load(num_tiles_ptr):
        return
    f = tl.program_id(0) % TILES_F * BF + tl.arange(0, BF)
    in_f = f < F
    expert = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    place = tl.load(tiles_ptr + tile * 3 + 1) + tl.arange(0, ROWS)
    is_pair = place < tl.load(tiles_ptr + tile * 3 + 2)
    token = tl.load(order_ptr + place, mask=is_pair, other=0) // TOP_K
    k = tl.arange(0, BK)
    gate_at = w_ptr + (expert * (2 * F) + f)[:, None] * D + k[None, :]
    x_at = x_ptr + token.to(tl.int64)[:, None] * D + k[None, :]
    gate = tl.zeros([BF, ROWS], tl.float32)
    up = tl.zeros([BF, ROWS], tl.float32)
    for start in tl.range(0, D, BK, num_stages=STAGES):
        x = tl.trans(tl.load(x_at, mask=within(is_pair, start, D, BK), other=0.0))
        if CODES == "":
            gate = tl.dot(tl.load(gate_at, mask=in_f[:, None]), x, gate, input_precision=PRECISION)
            up_at = gate_at + F * D
            up = tl.dot(tl.load(up_at, mask=in_f[:, None]), x, up, input_precision=PRECISION)
            gate_at += BK
        else:
            first = expert * (2 * F)
            gate = dot_packed(gate, w_ptr, scales_ptr, first, f, in_f, x, start, D, BK, CODES)
            up = dot_packed(up, w_ptr, scales_ptr, first + F, f, in_f, x, start, D, BK, CODES)
        x_at += BK
    if HAS_BIAS:
        bias_at = bias_ptr + expert * (2 * F) + f
        gate += tl.load(bias_at, mask=in_f, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias_at + F, mask=in_f, other=0.0).to(tl.float32)[:, None]
    # Rounded where separate kernels round.
    gate = gate.to(DTYPE).to(tl.float32)
    up = up.to(DTYPE).to(tl.float32)
    if ALPHA == 0.0:
        product = gate / (1.0 + tl.exp(-gate)) * up
    else:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        product = (up + UP_OFFSET) * gate / (1.0 + tl.exp(-ALPHA * gate))
    out_at = out_ptr + place.to(tl.int64)[None, :] * F + f[:, None]
    tl.store(out_at, product.to(DTYPE), mask=in_f[:, None] & is_pair[None, :])


@triton.jit
def down_of_experts(
    h_ptr,  # [M, F], in the order of `order`
    w_ptr,  # [E, D, F]; or its codes
    scales_ptr,  # of codes; else anything
    bias_ptr,  # [E, D], or anything
    weights_ptr,  # f32[M]: of pairs
    order_ptr,  # i32[M]
    tiles_ptr,  # i32[G, 3]
    num_tiles_ptr,  # i32[1]
    # outputs
    out_ptr,  # [TOP_K, T, D]
    T: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    BF: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    CODES: tl.constexpr,  # "": the weights are an array
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of [BF outputs, ROWS pairs], each pair times its weight."""
    TILES_D: tl.constexpr = (D + BF - 1) // BF
    tile = tl.program_id(0) // TILES_D
    if tile >= tl.load(num_tiles_ptr):
        return
    d = tl.program_id(0) % TILES_D * BF + tl.arange(0, BF)
    in_d = d < D
    expert = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    place = tl.load(tiles_ptr + tile * 3 + 1) + tl.arange(0, ROWS)
    is_pair = place < tl.load(tiles_ptr + tile * 3 + 2)
    pair = tl.load(order_ptr + place, mask=is_pair, other=0)
    k = tl.arange(0, BK)
    w_at = w_ptr + (expert * D + d)[:, None] * F + k[None, :]
    h_at = h_ptr + place.to(tl.int64)[:, None] * F + k[None, :]
    acc = tl.zeros([BF, ROWS], tl.float32)
    for start in tl.range(0, F, BK, num_stages=STAGES):
        h = tl.trans(tl.load(h_at, mask=within(is_pair, start, F, BK), other=0.0))
        if CODES == "":
            acc = tl.dot(tl.load(w_at, mask=in_d[:, None]), h, acc, input_precision=PRECISION)
            w_at += BK
        else:
            acc = dot_packed(acc, w_ptr, scales_ptr, expert * D, d, in_d, h, start, F, BK, CODES)
        h_at += BK
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * D + d, mask=in_d, other=0.0).to(tl.float32)[:, None]
    acc *= tl.load(weights_ptr + pair, mask=is_pair, other=0.0)[None, :]
    row = (pair % TOP_K).to(tl.int64) * T + pair // TOP_K
    out_at = out_ptr + row[None, :] * D + d[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=in_d[:, None] & is_pair[None, :])
