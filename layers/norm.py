"""Normalisation with a learned scale."""

import jax
from flax import nnx

from jengine.layers.param import param
from jengine.pallas_kernels.rms_norm.api import rms_norm


class RMSNorm(nnx.Module):
    """Root mean square norm (arXiv:1910.07467), rounded as Hugging Face's Llama does."""

    def __init__(self, dim: int, eps: float, dtype: str, axis: str = "embed") -> None:
        """`axis` is the logical axis of the scale: "head_dim" where each head is normalised."""
        self.eps = eps
        self.weight = param((dim,), (axis,), dtype, init="ones")

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        return rms_norm(x_TD, self.weight[...], eps=self.eps, num_tokens=num_tokens)
