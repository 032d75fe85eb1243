"""`add_rms_norm` out of its parts."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.linear.reference import sum_of_parts
from jengine.pallas_kernels.rms_norm.api import rms_norm


def add_rms_norm(
    x_TD: jax.Array,
    parts_PTD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    x_TD = add_parts(x_TD, parts_PTD, num_tokens)
    return x_TD, rms_norm(x_TD, weight_D, eps=eps, num_tokens=num_tokens)


def add_parts(x_TD: jax.Array, parts_PTD: jax.Array, num_tokens: jax.Array | None) -> jax.Array:
    """`x` and the rounded sum of the summands, which rows at or past `num_tokens` may lack."""
    added_TD = sum_of_parts(parts_PTD, x_TD.dtype)
    if parts_PTD.shape[0] > 1 and num_tokens is not None:
        is_real_T1 = jnp.arange(x_TD.shape[0], dtype=jnp.int32)[:, None] < num_tokens
        added_TD = jnp.where(is_real_T1, added_TD, 0)
    return x_TD + added_TD
