"""Plain-JAX `linear`, in the one shape that XLA:CPU runs fast and the same way for any number of
rows.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

# XLA:CPU sends a dot with one row (bfloat16: one or two) to a naive loop: 10 to 50 times slower,
# and with another order of summation than the dots with more rows, so that a row's bits would
# depend on its batch.
MIN_ROWS = 4
# With one output it calls the product a matrix times a vector, whose order depends on the rows too.
MIN_OUTPUTS = 2


def linear(
    x_TD: jax.Array,
    w_FD: jax.Array,
    bias_F: jax.Array | None = None,
    *,
    num_tokens: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    T, F = x_TD.shape[0], w_FD.shape[0]
    out_dtype = x_TD.dtype if out_dtype is None else out_dtype
    dtype = x_TD.dtype if x_TD.dtype == w_FD.dtype else jnp.float32
    x_TD = jnp.pad(x_TD, ((0, max(0, MIN_ROWS - T)), (0, 0)))
    w_FD = jnp.pad(w_FD, ((0, max(0, MIN_OUTPUTS - F)), (0, 0)))
    y_TF = lax.dot_general(
        x_TD.astype(dtype),
        w_FD.astype(dtype),
        (((1,), (1,)), ((), ())),
        # float32 means float32, also where the hardware would round the operands (TF32).
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )[:T, :F]
    if bias_F is not None:
        y_TF = y_TF + bias_F.astype(jnp.float32)[None, :]
    return y_TF.astype(out_dtype)


def sum_of_parts(parts_PTF: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[T, F] in `dtype`, rounded once. Spelled out: a reduction's order is XLA's to choose."""
    if parts_PTF.shape[0] == 1:
        return parts_PTF[0].astype(dtype)
    sum_TF = parts_PTF[0].astype(jnp.float32)
    for part in range(1, parts_PTF.shape[0]):
        sum_TF = sum_TF + parts_PTF[part].astype(jnp.float32)
    return sum_TF.astype(dtype)
