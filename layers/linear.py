"""Linear maps and embeddings. Weights are [out, in], as Hugging Face stores them and as XLA:CPU
runs them fastest.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.param import Size, param, weight_param
from jengine.pallas_kernels.linear.api import linear
from jengine.pallas_kernels.linear.reference import sum_of_parts
from jengine.pallas_kernels.packed import Packing
from jengine.sharding import collectives


class Linear(nnx.Module):
    """`x @ weight.T + bias`, accumulated in float32. Where ranks split its input, the result is the
    sum of theirs.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: Size,
        axes: tuple[str | None, str | None],
        dtype: str,
        *,
        bias: bool = False,
        packing: Packing | None = None,
    ) -> None:
        """`axes` are the logical axes of (out, in). `packing`: of the weight; None: it is an array
        of `dtype`.
        """
        self.in_axis = axes[1]
        self.weight = weight_param((out_dim, in_dim), axes, dtype, packing)
        self.bias = param((out_dim,), axes[:1], dtype, init="zeros") if bias else None

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        return collectives.sum_over(self._whole(x_TD, num_tokens), self.in_axis)

    def parts(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """[P, T, out]: summands of the result, for an operation that adds up anyway."""
        return sum_of_ranks(self.local_parts(x_TD, num_tokens), num_tokens, self.in_axis)

    def local_parts(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """As `parts`, of what this rank adds to the result."""
        return self._whole(x_TD, num_tokens)[None]

    def _whole(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """What this rank adds, in one summand."""
        bias = None if self.bias is None else collectives.once_over(self.bias[...], self.in_axis)
        return linear(x_TD, self.weight[...], bias, num_tokens=num_tokens, out_dtype=x_TD.dtype)


def sum_of_ranks(parts_PTF: jax.Array, num_tokens: jax.Array, *logical: str | None) -> jax.Array:
    """Summands of what all ranks that split these logical axes add: one, or on one rank its own.

    The sum of several, a token's experts, stays float32 and is rounded once by the next operation,
    as theirs would be. A single one was rounded by its product, and travels so, in half the bytes.
    """
    if collectives.ways(*logical) == 1:
        return parts_PTF
    if parts_PTF.shape[0] == 1:
        return collectives.sum_over(parts_PTF, *logical)
    # A single summand must be finite, padding too.
    is_real_T1 = jnp.arange(parts_PTF.shape[1], dtype=jnp.int32)[:, None] < num_tokens
    sum_TF = jnp.where(is_real_T1, sum_of_parts(parts_PTF, jnp.float32), 0.0)
    return collectives.sum_over(sum_TF, *logical)[None]


class Embedding(nnx.Module):
    """Token embedding; also the output head when the two are tied."""

    def __init__(self, vocab_size: int, dim: int, dtype: str) -> None:
        self.weight = param((vocab_size, dim), ("vocab", "embed"), dtype)

    def __call__(self, token_ids_T: jax.Array) -> jax.Array:
        weight_VD = self.weight[...]
        if collectives.ways("vocab") == 1:
            return weight_VD[token_ids_T]
        num_rows = weight_VD.shape[0]
        row_T = token_ids_T - collectives.rank_in("vocab") * num_rows
        is_ours_T1 = ((row_T >= 0) & (row_T < num_rows))[:, None]
        x_TD = jnp.where(is_ours_T1, weight_VD[jnp.clip(row_T, 0, num_rows - 1)], 0)
        return collectives.sum_over(x_TD, "vocab")


class LMHead(nnx.Module):
    """Untied output head."""

    def __init__(self, vocab_size: int, dim: int, dtype: str) -> None:
        self.weight = param((vocab_size, dim), ("vocab", "embed"), dtype)


def logits(hidden_SD: jax.Array, head_VD: jax.Array, num_seqs: jax.Array) -> jax.Array:
    """float32 logits of the rows that sample."""
    logits_SV = linear(hidden_SD, head_VD, None, num_tokens=num_seqs, out_dtype=jnp.float32)
    return collectives.gather_over(logits_SV, "vocab", 1)


def scaled(x_TD: jax.Array, factor: float) -> jax.Array:
    """`x * factor`, rounded before anything is added to it. Without the barrier XLA:CPU makes fused
    multiply-adds of the two in some shapes and not in others: a row's bits would depend on its
    batch.
    """
    product_TD = (x_TD.astype(jnp.float32) * factor).astype(x_TD.dtype)
    return jax.lax.optimization_barrier(product_TD)
