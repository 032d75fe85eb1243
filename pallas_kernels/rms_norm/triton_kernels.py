"""The Triton kernel of `rms_norm`. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl


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
    """One row, rounded after each product."""
    dtype = out_ptr.dtype.element_ty
    lane = tl.arange(0, DP)
    in_row = lane < D
    at = tl.program_id(0).to(tl.int64) * D + lane
    x = tl.load(x_ptr + at, mask=in_row, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + lane, mask=in_row, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 0) / D + EPS)
    normed = (x * factor).to(dtype).to(tl.float32)
    tl.store(out_ptr + at, (normed * weight).to(dtype), mask=in_row)
