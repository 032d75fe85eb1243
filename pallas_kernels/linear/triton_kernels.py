"""The Triton kernel of products with few rows. Imported only where a program for a GPU is
traced.
"""

import triton
import triton.language as tl

from jengine.pallas_kernels.packed_kernels import dot_packed
from jengine.pallas_kernels.silu_mul.triton_kernels import silu_times


@triton.jit
def load_rows(at, is_row, ALL: tl.constexpr, EVICTION: tl.constexpr):
    if ALL:
        tile = tl.load(at, eviction_policy=EVICTION)
    else:
        tile = tl.load(at, mask=is_row[:, None], other=0.0, eviction_policy=EVICTION)
    return tile


@triton.jit
def multiply_rows(
    x_ptr,  # [T, HEADS * D]
    w_ptr,  # [F, D]; gated: [2 F, D], gate above up; or its codes
    scales_ptr,  # of codes; else anything
    # outputs
    out_ptr,  # [T, F]
    T: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    BF: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,  # silu(gate) * up
    HEADS: tl.constexpr,  # whose outputs, F / HEADS each, see inputs of their own
    STAGES: tl.constexpr,
    CODES: tl.constexpr,  # "": the weight is an array
):
    """A tile of [BF weights, BT tokens]: weights are what is long, so they are the rows of the
    matrix unit, and a few tokens its columns.
    """
    TILES_T: tl.constexpr = (T + BT - 1) // BT
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    tile_t = pid % TILES_T
    f = pid // TILES_T * BF + tl.arange(0, BF)
    t = tile_t * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    in_t = t < T
    in_f = f < F
    w_at = w_ptr + f.to(tl.int64)[:, None] * D + k[None, :]
    x_at = x_ptr + t[:, None] * (HEADS * D) + k[None, :]
    if HEADS > 1:
        x_at += pid // TILES_T * BF // (F // HEADS) * D
    acc = tl.zeros([BF, BT], tl.float32)
    if GATED:
        up_acc = tl.zeros([BF, BT], tl.float32)
    for start in tl.range(0, D, BK, num_stages=STAGES):
        if CODES == "":
            w = load_rows(w_at, in_f, F % BF == 0, "evict_first")
            x = load_rows(x_at, in_t, T % BT == 0, "")
            acc = tl.dot(w, tl.trans(x), acc)
            if GATED:
                w = load_rows(w_at + F * D, in_f, F % BF == 0, "evict_first")
                up_acc = tl.dot(w, tl.trans(x), up_acc)
            w_at += BK
        else:
            x = tl.trans(load_rows(x_at, in_t, T % BT == 0, ""))
            acc = dot_packed(acc, w_ptr, scales_ptr, 0, f, in_f, x, start, D, BK, CODES)
            if GATED:
                up_acc = dot_packed(up_acc, w_ptr, scales_ptr, F, f, in_f, x, start, D, BK, CODES)
        x_at += BK
    if GATED:
        # Rounded where separate kernels round.
        gate = acc.to(DTYPE).to(tl.float32)
        acc = silu_times(gate, up_acc.to(DTYPE).to(tl.float32))
    out_at = out_ptr + t.to(tl.int64)[None, :] * F + f[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=in_f[:, None] & in_t[None, :])
