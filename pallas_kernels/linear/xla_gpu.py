"""`linear` for GPUs: XLA's matrix product is at the memory floor for few rows (81 of 78 us for
[1, 4096] x [4096, 28672] on an H100).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jengine.pallas_kernels.platform import is_batch_invariant, require_cuda

# Where a row's bits must not depend on its batch, products of more rows than the least of these are
# made of products of so many, tuned. For these cuBLASLt was seen to sum the depth in one chain; for
# 4,096 rows, untuned, it seems to cut it in some tiles.
ROW_BLOCKS = (8192, 2048, 1024)


def linear(
    x_TD: jax.Array,
    w_FD: jax.Array,
    bias_F: jax.Array | None = None,
    *,
    num_tokens: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    require_cuda()
    out_dtype = jnp.dtype(x_TD.dtype if out_dtype is None else out_dtype)
    dtype = x_TD.dtype if x_TD.dtype == w_FD.dtype else jnp.dtype(jnp.float32)

    def product(x_TD: jax.Array) -> jax.Array:
        # Sums are float32 whatever the result's dtype; asking for the result's own saves XLA a pass
        # over a float32 copy.
        return lax.dot_general(
            x_TD.astype(dtype),
            w_FD.astype(dtype),
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=out_dtype if bias_F is None else jnp.float32,
        )

    if is_batch_invariant():
        # The barrier: whatever XLA would let the product do as well, it rounds otherwise.
        blocks = [lax.optimization_barrier(product(block)) for block in row_blocks(x_TD)]
        y_TF = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks)[: x_TD.shape[0]]
    else:
        y_TF = product(x_TD)
    if bias_F is not None:
        y_TF = y_TF + bias_F.astype(jnp.float32)[None, :]
    return y_TF.astype(out_dtype)


def row_blocks(x_TD: jax.Array) -> list[jax.Array]:
    """The rows in blocks of `ROW_BLOCKS`, padded at the end; few rows as they are."""
    T, least = x_TD.shape[0], ROW_BLOCKS[-1]
    if least >= T:
        return [x_TD]
    x_TD = jnp.pad(x_TD, ((0, -T % least), (0, 0)))
    blocks, first = [], 0
    while first < x_TD.shape[0]:
        size = next(size for size in ROW_BLOCKS if first + size <= x_TD.shape[0])
        blocks.append(lax.slice_in_dim(x_TD, first, first + size))
        first += size
    return blocks
