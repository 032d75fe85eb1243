"""Packed weights in Triton kernels. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl


@triton.jit
def dot_packed(
    acc,  # f32[ROWS, COLUMNS]
    codes_ptr,  # u8[rows, DEPTH / codes per byte]
    scales_ptr,  # [rows, groups of DEPTH]
    row,  # i64[ROWS]
    is_row,
    x,  # [BK, COLUMNS]: inputs `start:start + BK` of the columns, zeros past DEPTH
    start,  # a multiple of BK
    DEPTH: tl.constexpr,
    BK: tl.constexpr,
    CODES: tl.constexpr,
):
    """`acc` plus the product of rows of a packed weight with `x`. Weights become bfloat16 (or the
    dtype of `x`) in registers, exact where scales are powers of two.
    """
    if CODES == "e2m1":
        BYTES: tl.constexpr = BK // 2
        GROUPS: tl.constexpr = BK // 32
        byte = start // 2 + tl.arange(0, BYTES)
        group = start // 32 + tl.arange(0, GROUPS)
        codes = tl.load(
            codes_ptr + row[:, None] * (DEPTH // 2) + byte[None, :],
            mask=is_row[:, None] & (byte < DEPTH // 2)[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        scales = tl.load(
            scales_ptr + row[:, None] * (DEPTH // 32) + group[None, :],
            mask=is_row[:, None] & (group < DEPTH // 32)[None, :],
            other=0,
        )
        # Triton's own unpacking: a few byte permutations for eight weights.
        acc = tl.dot_scaled(codes, scales, "e2m1", x, None, "bf16", acc, fast_math=True)
    else:
        tl.static_assert(CODES == "e4m3" and BK <= 128, "a tile is within a group")
        k = start + tl.arange(0, BK)
        codes = tl.load(
            codes_ptr + row[:, None] * DEPTH + k[None, :],
            mask=is_row[:, None] & (k < DEPTH)[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        scale = tl.load(
            scales_ptr + row * ((DEPTH + 127) // 128) + start // 128, mask=is_row, other=0
        )
        if scales_ptr.dtype.element_ty == tl.uint8:  # a power of two, by its exponent
            bits = tl.maximum(scale.to(tl.int32) << 23, 1 << 22)
            scale = bits.to(tl.float32, bitcast=True)
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        acc = tl.dot((values * scale[:, None]).to(x.dtype), x, acc)
    return acc
