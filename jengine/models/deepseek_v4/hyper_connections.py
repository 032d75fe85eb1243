"""Manifold-constrained hyper-connections (arXiv:2512.24880): instead of
one residual stream there are c of them, and each token's own numbers say how a block reads them
and how they mix.

A block reads `sum_i pre[i] X[i]`, and stream j becomes `post[j] y + sum_i mix[i, j] X[i]`, where
mix is nearly doubly stochastic: Sinkhorn's rounds make its columns, then nearly its rows, sum to 1.
All of it in float32.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.norm import WideRMSNorm
from jengine.layers.param import param
from jengine.models.deepseek_v4.config import HyperConfig
from jengine.pallas_kernels.read_streams.api import read_streams
from jengine.pallas_kernels.read_streams.reference import collapsed, projected, weighted_sum


@dataclass(frozen=True)
class Mixing:
    """How a block's result joins the streams: float32 post [T, c], mix [T, old c, new c]."""

    post_TC: jax.Array
    mix_TCC: jax.Array

    def join(self, y_TD: jax.Array, streams_TCD: jax.Array) -> jax.Array:
        """The streams after a block that gave `y`."""
        old = [streams_TCD[:, i].astype(jnp.float32) for i in range(streams_TCD.shape[1])]
        wide_y_TD = y_TD.astype(jnp.float32)
        new = [
            weighted_sum(
                [wide_y_TD, *old],
                [self.post_TC[:, j], *(self.mix_TCC[:, i, j] for i in range(len(old)))],
            )
            for j in range(len(old))
        ]
        return jnp.stack(new, axis=1).astype(streams_TCD.dtype)


class HyperConnection(nnx.Module):
    """Around one block. Rows of `fn`: pre, post, then mix, old streams first."""

    def __init__(self, dim: int, hyper: HyperConfig, norm_eps: float) -> None:
        c = hyper.num_streams
        self.hyper, self.norm_eps = hyper, norm_eps
        rows = 2 * c + c * c
        self.fn = param((rows, c * dim), (None, "embed"), "float32")
        self.base = param((rows,), (None,), "float32", init="zeros")
        self.scale = param((3,), (None,), "float32", init="ones")

    def read(
        self, streams_TCD: jax.Array, norm: WideRMSNorm, num_tokens: jax.Array
    ) -> tuple[jax.Array, Mixing]:
        """(the block's input [T, D], normed by `norm`; how its result joins)."""
        x_TD, post_TC, mix_TCC = read_streams(
            streams_TCD,
            self.fn[...],
            self.base[...],
            self.scale[...],
            norm.weight[...],
            num_tokens,
            iterations=self.hyper.sinkhorn_iters,
            eps=self.hyper.eps,
            norm_eps=self.norm_eps,
        )
        return x_TD, Mixing(post_TC, mix_TCC)


class HyperHead(nnx.Module):
    """What is left of the streams after the last layer."""

    def __init__(self, dim: int, hyper: HyperConfig, norm_eps: float) -> None:
        c = hyper.num_streams
        self.hyper, self.norm_eps = hyper, norm_eps
        self.fn = param((c, c * dim), (None, "embed"), "float32")
        self.base = param((c,), (None,), "float32", init="zeros")
        self.scale = param((1,), (None,), "float32", init="ones")

    def __call__(self, streams_TCD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        numbers_TC = projected(streams_TCD, self.fn[...], self.norm_eps, num_tokens)
        numbers_TC = numbers_TC * self.scale[...][None] + self.base[...][None]
        return collapsed(streams_TCD, jax.nn.sigmoid(numbers_TC) + self.hyper.eps)
