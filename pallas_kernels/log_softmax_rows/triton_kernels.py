"""The Triton kernel of `log_softmax_rows`. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl


@triton.jit
def sum_of_row(
    x_ptr,  # f32[S, V]
    # outputs
    top_ptr,  # f32[S, 1]: largest entry
    total_ptr,  # f32[S, 1]: sum of exp(x - top)
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, block by block; each lane adds up its own columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        at = start + columns
        x = tl.load(x_ptr + row * V + at, mask=at < V, other=-float("inf"))
        tops = tl.maximum(tops, x)
    top = tl.max(tops, 0)
    totals = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + columns
        x = tl.load(x_ptr + row * V + at, mask=at < V, other=-float("inf"))
        totals += tl.exp(x - top)
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, tl.sum(totals, 0))
