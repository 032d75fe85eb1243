"""The Triton kernel of `rms_norm`. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl


@triton.jit
def normed(x, weight, D: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """A float32 row; rounded after each product."""
    factor = tl.rsqrt(tl.sum(x * x, 0) / D + EPS)
    return ((x * factor).to(DTYPE).to(tl.float32) * weight).to(DTYPE)


@triton.jit
def norm_row(
    x_ptr,  # [T, D]
    weight_ptr,  # [D]
    # outputs
    out_ptr,  # [T, D]
    D: tl.constexpr,
    DP: tl.constexpr,  # D, rounded up to a power of two
    EPS: tl.constexpr,
):
    d = tl.arange(0, DP)
    mask = d < D
    at = tl.program_id(0).to(tl.int64) * D + d
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, normed(x, weight, D, EPS, out_ptr.dtype.element_ty), mask=mask)
