"""The Triton kernel of `add_rms_norm`. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl

from jengine.pallas_kernels.rms_norm.triton_kernels import normed


@triton.jit
def add_and_norm(
    x_ptr,  # [T, D]
    parts_ptr,  # [P, T, D]
    weight_ptr,  # [D]
    num_tokens_ptr,  # i32[1]: later rows have no summands
    # outputs
    sum_ptr,  # [T, D]
    normed_ptr,  # [T, D]
    T: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D, rounded up to a power of two
    P: tl.constexpr,
    EPS: tl.constexpr,
):
    """One row; rounded after each operation, as separate kernels would."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    mask = d < D
    is_read = mask & (row < tl.load(num_tokens_ptr))
    parts_at = parts_ptr + row * D + d
    added = tl.load(parts_at, mask=is_read, other=0.0).to(tl.float32)
    for part in tl.static_range(1, P):
        added += tl.load(parts_at + part * T * D, mask=is_read, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
    x = (x + added.to(DTYPE).to(tl.float32)).to(DTYPE)
    tl.store(sum_ptr + row * D + d, x, mask=mask)
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * D + d, normed(x.to(tl.float32), weight, D, EPS, DTYPE), mask=mask)
