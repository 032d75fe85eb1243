"""Normalisation with a learned scale."""

import jax
from flax import nnx

from jengine.layers.param import param
from jengine.pallas_kernels.rms_norm.api import rms_norm


class RMSNorm(nnx.Module):
    """Root mean square norm (arXiv:1910.07467), rounded as Hugging Face's Llama does."""

    def __init__(self, dim: int, eps: float, dtype: str) -> None:
        self.eps = eps
        self.weight = param((dim,), ("embed",), dtype, init="ones")

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        return rms_norm(x_TD, self.weight[...], eps=self.eps, num_tokens=num_tokens)


class HeadNorm(nnx.Module):
    """The same for each head on its own, with one scale for all heads (arXiv:2302.05442)."""

    def __init__(self, head_dim: int, eps: float, dtype: str) -> None:
        self.eps = eps
        self.weight = param((head_dim,), ("head_dim",), dtype, init="ones")

    def __call__(self, x_TNH: jax.Array, num_tokens: jax.Array) -> jax.Array:
        T, N, H = x_TNH.shape
        rows = x_TNH.reshape(T * N, H)
        normed = rms_norm(rows, self.weight[...], eps=self.eps, num_tokens=num_tokens * N)
        return normed.reshape(T, N, H)
