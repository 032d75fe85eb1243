"""Plain-JAX `read_streams`. Sums of few are spelled out: a reduction's order is XLA's to choose,
and XLA:CPU's choice depends on how many tokens there are.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jengine.pallas_kernels.linear.api import linear
from jengine.pallas_kernels.rms_norm.api import rms_norm

MIN_COLUMNS = 8  # of a product that sums rows: see `rms_norm/reference.py`


def read_streams(
    streams_TCD: jax.Array,
    fn_RX: jax.Array,
    base_R: jax.Array,
    scale_3: jax.Array,
    norm_D: jax.Array,
    num_tokens: jax.Array,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    c = streams_TCD.shape[1]
    numbers_TR = projected(streams_TCD, fn_RX, norm_eps, num_tokens)
    pre_TC, post_TC, mix_TX = (
        numbers_TR[:, rows] * scale_3[kind] + base_R[None, rows]
        for kind, rows in enumerate((slice(0, c), slice(c, 2 * c), slice(2 * c, None)))
    )
    x_TD = collapsed(streams_TCD, jax.nn.sigmoid(pre_TC) + eps)
    wide_TD = rms_norm(x_TD.astype(jnp.float32), norm_D, eps=norm_eps, num_tokens=num_tokens)
    mix_TCC = sinkhorn(mix_TX.reshape(-1, c, c), iterations, eps)
    return wide_TD.astype(x_TD.dtype), 2.0 * jax.nn.sigmoid(post_TC), mix_TCC


def projected(
    streams_TCD: jax.Array, fn_RX: jax.Array, eps: float, num_tokens: jax.Array
) -> jax.Array:
    """float32 [T, R]: of all streams of a token side by side, over their root mean square."""
    wide_TX = streams_TCD.reshape(streams_TCD.shape[0], -1).astype(jnp.float32)
    ones = jnp.ones((MIN_COLUMNS, wide_TX.shape[1]), jnp.float32)
    means_T1 = linear(wide_TX * wide_TX, ones, num_tokens=num_tokens)[:, :1] / wide_TX.shape[1]
    return linear(wide_TX, fn_RX, num_tokens=num_tokens) * lax.rsqrt(means_T1 + eps)


def sinkhorn(numbers_TCC: jax.Array, iterations: int, eps: float) -> jax.Array:
    """[T, c, c]: a softmax of each row, then columns and rows divided by their sums in turn,
    columns first and last."""

    def rows(m_CCT: jax.Array) -> jax.Array:
        return m_CCT / (folded(jnp.add, m_CCT, 1) + eps)

    def columns(m_CCT: jax.Array) -> jax.Array:
        return m_CCT / (folded(jnp.add, m_CCT, 0) + eps)

    # Tokens last: so XLA:CPU gives a token the same bits in any batch, and fills its vectors.
    numbers_CCT = jnp.moveaxis(numbers_TCC, 0, -1)
    powers_CCT = jnp.exp(numbers_CCT - folded(jnp.maximum, numbers_CCT, 1))
    m_CCT = columns(powers_CCT / folded(jnp.add, powers_CCT, 1) + eps)
    m_CCT = lax.fori_loop(0, iterations - 1, lambda _, m: columns(rows(m)), m_CCT)
    return jnp.moveaxis(m_CCT, -1, 0)


def collapsed(streams_TCD: jax.Array, weights_TC: jax.Array) -> jax.Array:
    """[T, D] in the streams' dtype."""
    c = streams_TCD.shape[1]
    streams = [streams_TCD[:, i].astype(jnp.float32) for i in range(c)]
    sum_TD = weighted_sum(streams, [weights_TC[:, i] for i in range(c)])
    return sum_TD.astype(streams_TCD.dtype)


def weighted_sum(vectors: list[jax.Array], weights: list[jax.Array]) -> jax.Array:
    out_TD = weights[0][:, None] * vectors[0]
    for weight_T, vector_TD in zip(weights[1:], vectors[1:], strict=True):
        out_TD = out_TD + weight_T[:, None] * vector_TD
    return out_TD


def folded(
    operation: Callable[[jax.Array, jax.Array], jax.Array], m_CCT: jax.Array, axis: int
) -> jax.Array:
    """A reduction along an axis of few, which stays: where XLA:CPU fuses its own with what follows,
    a token's bits depend on how many there are."""
    slices = [lax.slice_in_dim(m_CCT, i, i + 1, axis=axis) for i in range(m_CCT.shape[axis])]
    return functools.reduce(operation, slices)
