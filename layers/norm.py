"""Normalisation with a learned scale."""

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.param import param
from jengine.pallas_kernels.add_rms_norm.api import add_rms_norm
from jengine.pallas_kernels.add_rms_norm.reference import add_parts
from jengine.pallas_kernels.linear.api import linear
from jengine.pallas_kernels.rms_norm.api import rms_norm

MIN_COLUMNS = 8  # of a product that sums rows: see `rms_norm/reference.py`


class RMSNorm(nnx.Module):
    """Root mean square norm (arXiv:1910.07467), rounded as Hugging Face's Llama does."""

    def __init__(self, dim: int, eps: float, dtype: str, axis: str = "embed") -> None:
        """`axis` is the logical axis of the scale: "head_dim" where each head is normalised."""
        self.eps = eps
        self.weight = param((dim,), (axis,), dtype, init="ones")

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        return rms_norm(x_TD, self.weight[...], eps=self.eps, num_tokens=num_tokens)

    def after(
        self, x_TD: jax.Array, added_PTD: jax.Array | None, num_tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(x plus the summands of a block's result, the norm of that)."""
        if added_PTD is None:
            return x_TD, self(x_TD, num_tokens)
        weight = self.weight[...]
        return add_rms_norm(x_TD, added_PTD, weight, eps=self.eps, num_tokens=num_tokens)


class WideRMSNorm(RMSNorm):
    """RMSNorm that rounds once, after the scale, as Hugging Face's Gemma and OLMo 2 do. The scale
    is float32: Gemma's is 1 + a weight, which bfloat16 would not hold.
    """

    def __init__(self, dim: int, eps: float, dtype: str, axis: str = "embed") -> None:
        del dtype
        super().__init__(dim, eps, "float32", axis)

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        return super().__call__(x_TD.astype(jnp.float32), num_tokens).astype(x_TD.dtype)

    def after(
        self, x_TD: jax.Array, added_PTD: jax.Array | None, num_tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if added_PTD is not None:
            x_TD = add_parts(x_TD, added_PTD, num_tokens)
        return x_TD, self(x_TD, num_tokens)


class LayerNorm(WideRMSNorm):
    """Layer normalisation (arXiv:1607.06450) without a bias: the RMS norm of centred rows."""

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        centred_TD = centre(x_TD.astype(jnp.float32), num_tokens)
        return super().__call__(centred_TD, num_tokens).astype(x_TD.dtype)


class BiasedLayerNorm(LayerNorm):
    """Layer normalisation with a bias."""

    def __init__(self, dim: int, eps: float, dtype: str, axis: str = "embed") -> None:
        super().__init__(dim, eps, dtype, axis)
        self.bias = param((dim,), (axis,), "float32", init="zeros")

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        normed_TD = super().__call__(x_TD.astype(jnp.float32), num_tokens)
        # Else XLA:CPU may fuse scale and bias in some shapes only: see `layers.linear.scaled`.
        normed_TD = jax.lax.optimization_barrier(normed_TD)
        return (normed_TD + self.bias[...][None, :]).astype(x_TD.dtype)


def centre(x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """Float32 rows less their means."""
    return x_TD - mean(x_TD, num_tokens)


def mean(x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """[T, 1] of float32 rows: sums that depend on their own row only."""
    ones = jnp.ones((MIN_COLUMNS, x_TD.shape[1]), jnp.float32)
    return linear(x_TD, ones, num_tokens=num_tokens)[:, :1] / x_TD.shape[1]
