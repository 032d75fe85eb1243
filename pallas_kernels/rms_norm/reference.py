"""Plain-JAX `rms_norm`, with a sum that is the same for any number of rows.

XLA:CPU (0.10 and 0.11) sums a float32 row in an order that depends on how many rows there are:
fewer than 8 rows of 576 give other bits than more, rows of 64 fewer than 64. Its dots with at least
4 rows and 2 columns do not.
"""

import jax
import jax.numpy as jnp
from jax import lax

MIN_ROWS = 4
MIN_COLUMNS = 8


def rms_norm(
    x_TD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    num_tokens: jax.Array | None = None,
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    T, D = x_TD.shape
    wide_TD = x_TD.astype(jnp.float32)
    squares_TD = jnp.pad(wide_TD * wide_TD, ((0, max(0, MIN_ROWS - T)), (0, 0)))
    sums = lax.dot_general(
        squares_TD,
        jnp.ones((MIN_COLUMNS, D), jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
    factor_T1 = lax.rsqrt(sums[:T, :1] / D + eps)
    normed_TD = (wide_TD * factor_T1).astype(x_TD.dtype).astype(jnp.float32)
    return (normed_TD * weight_D.astype(jnp.float32)[None, :]).astype(x_TD.dtype)
