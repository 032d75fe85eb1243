"""Manifold-constrained hyper-connections (arXiv:2512.24880): instead of
one residual stream there are c of them, and each token's own numbers say how a block reads them
and how they mix.

A block reads `sum_i pre[i] X[i]`, and stream j becomes `post[j] y + sum_i mix[i, j] X[i]`, where
mix is nearly doubly stochastic: Sinkhorn's rounds make its columns, then nearly its rows, sum to 1.
All of it in float32.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jengine.layers.norm import row_means
from jengine.layers.param import param
from jengine.models.deepseek_v4.config import HyperConfig
from jengine.pallas_kernels.linear.api import linear


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

    def read(self, streams_TCD: jax.Array, num_tokens: jax.Array) -> tuple[jax.Array, Mixing]:
        """(the block's input [T, D], how its result joins)."""
        c, eps = self.hyper.num_streams, self.hyper.eps
        numbers_TR = projected(streams_TCD, self.fn[...], self.norm_eps, num_tokens)
        scale_3, base_R = self.scale[...], self.base[...]
        pre_TC, post_TC, mix_TX = (
            numbers_TR[:, rows] * scale_3[kind] + base_R[None, rows]
            for kind, rows in enumerate((slice(0, c), slice(c, 2 * c), slice(2 * c, None)))
        )
        pre_TC = jax.nn.sigmoid(pre_TC) + eps
        post_TC = 2.0 * jax.nn.sigmoid(post_TC)
        mix_TCC = sinkhorn(mix_TX.reshape(-1, c, c), self.hyper)
        return collapsed(streams_TCD, pre_TC), Mixing(post_TC, mix_TCC)


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


def projected(
    streams_TCD: jax.Array, fn_RX: jax.Array, eps: float, num_tokens: jax.Array
) -> jax.Array:
    """float32 [T, R]: of all streams of a token side by side, over their root mean square."""
    wide_TX = streams_TCD.reshape(streams_TCD.shape[0], -1).astype(jnp.float32)
    factor_T1 = lax.rsqrt(row_means(wide_TX * wide_TX, num_tokens) + eps)
    return linear(wide_TX, fn_RX, num_tokens=num_tokens) * factor_T1


def sinkhorn(numbers_TCC: jax.Array, hyper: HyperConfig) -> jax.Array:
    """[T, c, c]: a softmax of each row, then columns and rows divided by their sums in turn,
    columns first and last."""
    eps = hyper.eps

    def rows(m_CCT: jax.Array) -> jax.Array:
        return m_CCT / (folded(jnp.add, m_CCT, 1) + eps)

    def columns(m_CCT: jax.Array) -> jax.Array:
        return m_CCT / (folded(jnp.add, m_CCT, 0) + eps)

    # Tokens last: so XLA:CPU gives a token the same bits in any batch, and fills its vectors.
    numbers_CCT = jnp.moveaxis(numbers_TCC, 0, -1)
    powers_CCT = jnp.exp(numbers_CCT - folded(jnp.maximum, numbers_CCT, 1))
    m_CCT = columns(powers_CCT / folded(jnp.add, powers_CCT, 1) + eps)
    m_CCT = lax.fori_loop(0, hyper.sinkhorn_iters - 1, lambda _, m: columns(rows(m)), m_CCT)
    return jnp.moveaxis(m_CCT, -1, 0)


def collapsed(streams_TCD: jax.Array, weights_TC: jax.Array) -> jax.Array:
    """[T, D] in the streams' dtype."""
    c = streams_TCD.shape[1]
    streams = [streams_TCD[:, i].astype(jnp.float32) for i in range(c)]
    sum_TD = weighted_sum(streams, [weights_TC[:, i] for i in range(c)])
    return sum_TD.astype(streams_TCD.dtype)


def weighted_sum(vectors: list[jax.Array], weights: list[jax.Array]) -> jax.Array:
    """Spelled out: a reduction's order is XLA's to choose."""
    out_TD = weights[0][:, None] * vectors[0]
    for weight_T, vector_TD in zip(weights[1:], vectors[1:], strict=True):
        out_TD = out_TD + weight_T[:, None] * vector_TD
    return out_TD


def folded(
    operation: Callable[[jax.Array, jax.Array], jax.Array], m_CCT: jax.Array, axis: int
) -> jax.Array:
    """A reduction along an axis of few, which stays. Spelled out too: where XLA:CPU fuses its own
    with what follows, a token's bits depend on how many there are."""
    slices = [lax.slice_in_dim(m_CCT, i, i + 1, axis=axis) for i in range(m_CCT.shape[axis])]
    return functools.reduce(operation, slices)
