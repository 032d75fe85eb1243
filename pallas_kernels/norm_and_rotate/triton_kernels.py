"""The Triton kernel of `norm_and_rotate`. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl


@triton.jit
def norm_rows(
    x_ptr,  # [rows, H]: N of a token
    cos_ptr,  # f32[T, PAIRS]
    sin_ptr,  # f32[T, PAIRS]
    # outputs
    out_ptr,  # [rows, H]
    NUM_ROWS: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,  # H, rounded up to a power of two
    PAIRS: tl.constexpr,  # at the end of a row
    PP: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    EPS: tl.constexpr,
):
    """Some rows; rounded after each operation, as separate kernels would."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    STILL: tl.constexpr = H - 2 * PAIRS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = (row < NUM_ROWS)[:, None]
    at = row.to(tl.int64)[:, None] * H
    h = tl.arange(0, HP)[None, :]
    x = tl.load(x_ptr + at + h, mask=is_row & (h < H), other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 1) / H + EPS)[:, None]
    tl.store(out_ptr + at + h, (x * factor).to(DTYPE), mask=is_row & (h < STILL))
    # The end once more, as the first and the second of each pair.
    pair = tl.arange(0, PP)[None, :]
    is_pair = is_row & (pair < PAIRS)
    first = STILL + 2 * pair
    a = tl.load(x_ptr + at + first, mask=is_pair, other=0.0).to(tl.float32) * factor
    b = tl.load(x_ptr + at + first + 1, mask=is_pair, other=0.0).to(tl.float32) * factor
    a = a.to(DTYPE).to(tl.float32)
    b = b.to(DTYPE).to(tl.float32)
    turn = (row // N)[:, None] * PAIRS + pair
    cos = tl.load(cos_ptr + turn, mask=is_pair, other=0.0)
    sin = tl.load(sin_ptr + turn, mask=is_pair, other=0.0)
    turned = tl.interleave(a * cos - b * sin, b * cos + a * sin)
    r = tl.arange(0, 2 * PP)[None, :]
    out_at = out_ptr + at + STILL + r
    tl.store(out_at, turned.to(DTYPE), mask=is_row & (r < 2 * PAIRS))
