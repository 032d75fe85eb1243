"""Packed weights in Triton kernels. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl


@triton.jit
def dot_packed(
    acc,  # f32[ROWS, COLUMNS]
    codes_ptr,  # u8[rows, DEPTH / codes per byte]
    scales_ptr,  # [rows, groups of DEPTH]
    first,  # i64: where rows are counted from, within 2^31 bytes
    row,  # i32[ROWS]
    is_row,
    x,  # [BK, COLUMNS]: inputs `start:start + BK` of the columns, zeros past DEPTH
    start,  # a multiple of BK
    DEPTH: tl.constexpr,
    BK: tl.constexpr,
    CODES: tl.constexpr,
):
    """`acc` plus the product of rows of a packed weight with `x` in bfloat16. Weights become that
    in registers, exact where scales are powers of two.
    """
    if CODES == "e2m1":
        ROWS: tl.constexpr = acc.shape[0]
        BYTES: tl.constexpr = BK // 2
        GROUPS: tl.constexpr = BK // 32
        byte = start // 2 + tl.arange(0, BYTES)
        group = start // 32 + tl.arange(0, GROUPS)
        codes = tl.load(
            codes_ptr + first * (DEPTH // 2) + (row[:, None] * (DEPTH // 2) + byte[None, :]),
            mask=is_row[:, None] & (byte < DEPTH // 2)[None, :],
            other=0,
        )
        scales = tl.load(
            scales_ptr + first * (DEPTH // 32) + (row[:, None] * (DEPTH // 32) + group[None, :]),
            mask=is_row[:, None] & (group < DEPTH // 32)[None, :],
            other=0,
        )
        # Both codes of a byte in one word, each where bfloat16 has its sign, the end of its
        # exponent and the start of its fraction: too small by 2^126, subnormal numbers too. In this
        # form the compiler keeps a pair in a register from its load to the product and multiplies
        # both at once; with `tl.dot_scaled` it would wait for every `x`.
        twice = codes.to(tl.uint32) * 0x1001
        pairs = ((twice << 6) & 0x01C001C0) | ((twice << 12) & 0x80008000)
        halves = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))
        values = halves.reshape([ROWS, BK]).to(tl.bfloat16, bitcast=True)
        values *= tl.full([], 8.507059173023462e37, tl.bfloat16)  # 2^126
        bits = tl.maximum(scales.to(tl.uint32) << 7, 1 << 6).to(tl.uint16)  # from 2^-127 on
        scales = bits.to(tl.bfloat16, bitcast=True)[:, :, None]
        weights = (values.reshape([ROWS, GROUPS, 32]) * scales).reshape([ROWS, BK])
        acc = tl.dot(weights, x, acc)
    else:
        tl.static_assert(CODES == "e4m3" and BK <= 128, "a tile is within a group")
        k = start + tl.arange(0, BK)
        codes = tl.load(
            codes_ptr + first * DEPTH + (row[:, None] * DEPTH + k[None, :]),
            mask=is_row[:, None] & (k < DEPTH)[None, :],
            other=0,
        )
        GROUPS: tl.constexpr = (DEPTH + 127) // 128
        scale_at = scales_ptr + first * GROUPS + (row * GROUPS + start // 128)
        scale = tl.load(scale_at, mask=is_row, other=0)
        if scales_ptr.dtype.element_ty == tl.uint8:  # a power of two, by its exponent
            bits = tl.maximum(scale.to(tl.int32) << 23, 1 << 22)
            scale = bits.to(tl.float32, bitcast=True)
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        acc = tl.dot((values * scale[:, None]).to(tl.bfloat16), x, acc)
    return acc
