"""Normalisation. Written by hand because `nnx.RMSNorm` mixes dtypes, which strict promotion
forbids.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.param import param


def rms_norm(x_TD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * weight` in float32, returned in the dtype of `x` (arXiv:1910.07467, as Hugging
    Face rounds it).
    """
    x32 = x_TD.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x_TD.dtype) * weight_D[None, :]


class RMSNorm(nnx.Module):
    """Root mean square norm with a learned scale."""

    def __init__(self, dim: int, eps: float, dtype: str) -> None:
        self.eps = eps
        self.weight = param((dim,), ("embed",), dtype, init="ones")

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        return rms_norm(x_TD, self.weight[...], self.eps)
