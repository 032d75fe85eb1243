"""Linear maps and embeddings. Weights are [out, in], as Hugging Face stores them and as XLA:CPU
runs them fastest.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.param import param
from jengine.pallas_kernels.linear.api import linear, linear_parts


class Linear(nnx.Module):
    """`x @ weight.T + bias`, accumulated in float32."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        axes: tuple[str | None, str | None],
        dtype: str,
        *,
        bias: bool = False,
    ) -> None:
        """`axes` are the logical axes of (out, in)."""
        self.weight = param((out_dim, in_dim), axes, dtype)
        self.bias = param((out_dim,), axes[:1], dtype, init="zeros") if bias else None

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        return linear(x_TD, self.weight[...], bias, num_tokens=num_tokens, out_dtype=x_TD.dtype)

    def parts(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """[P, T, out]: summands of the result, for an operation that adds up anyway."""
        if self.bias is not None:
            return self(x_TD, num_tokens)[None]
        return linear_parts(x_TD, self.weight[...], num_tokens=num_tokens)


class Embedding(nnx.Module):
    """Token embedding; also the output head when the two are tied."""

    def __init__(self, vocab_size: int, dim: int, dtype: str) -> None:
        self.weight = param((vocab_size, dim), ("vocab", "embed"), dtype)

    def __call__(self, token_ids_T: jax.Array) -> jax.Array:
        return self.weight[...][token_ids_T]


class LMHead(nnx.Module):
    """Untied output head."""

    def __init__(self, vocab_size: int, dim: int, dtype: str) -> None:
        self.weight = param((vocab_size, dim), ("vocab", "embed"), dtype)


def logits(hidden_SD: jax.Array, head_VD: jax.Array, num_seqs: jax.Array) -> jax.Array:
    """float32 logits of the rows that sample."""
    return linear(hidden_SD, head_VD, None, num_tokens=num_seqs, out_dtype=jnp.float32)


def scaled(x_TD: jax.Array, factor: float) -> jax.Array:
    """`x * factor`, rounded before anything is added to it. Without the barrier XLA:CPU makes fused
    multiply-adds of the two in some shapes and not in others: a row's bits would depend on its
    batch.
    """
    product_TD = (x_TD.astype(jnp.float32) * factor).astype(x_TD.dtype)
    return jax.lax.optimization_barrier(product_TD)
