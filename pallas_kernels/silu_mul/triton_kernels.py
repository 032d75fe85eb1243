"""The Triton kernel of `silu_mul`. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl


@triton.jit
def silu_times(gate, up):
    """Of float32: the same bits in every kernel that ends with it."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def silu_mul_row(
    x_ptr,  # [T, 2 F]: gate and up side by side
    # outputs
    out_ptr,  # [T, F]
    F: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = f < F
    gate = tl.load(x_ptr + row * (2 * F) + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * F) + F + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * F + f, silu_times(gate, up).to(out_ptr.dtype.element_ty), mask=mask)
