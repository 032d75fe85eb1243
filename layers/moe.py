"""Mixture of experts: a router picks a few MLPs for each token (arXiv:1701.06538, 2101.03961)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.param import param
from jengine.pallas_kernels.grouped_matmul.activation import ClampedSwiGLU
from jengine.pallas_kernels.grouped_matmul.api import expert_mlp
from jengine.pallas_kernels.linear.api import linear
from jengine.pallas_kernels.top_k_rows.api import top_k_rows


@dataclass(frozen=True)
class MoEConfig:
    """The numbers of a model's routed experts. Field names are Hugging Face's."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool  # the weights of a token's experts add up to one
    bias: bool = False  # of router and experts
    activation: ClampedSwiGLU | None = None  # in the place of SwiGLU


def route(logits_TE: jax.Array, top_k: int, *, renormalise: bool) -> tuple[jax.Array, jax.Array]:
    """(expert ids i32 [T, k], weights f32 [T, k]), the most probable expert first, equal ones by
    index. Weights are softmax probabilities over all experts, or over the chosen ones alone if
    `renormalise`.
    """
    top_Tk, ids_Tk = top_k_rows(logits_TE, top_k)
    scores_Tk = jnp.exp(top_Tk - top_Tk[:, :1])
    over = scores_Tk if renormalise else jnp.exp(logits_TE - top_Tk[:, :1])
    return ids_Tk, scores_Tk / _row_sums(over)


def _row_sums(x_TE: jax.Array) -> jax.Array:
    """[T, 1], halves added to halves: XLA:CPU's own row sums change their order with the number of
    rows, and a weight's bits would depend on its batch.
    """
    width = x_TE.shape[1]
    size = 1 << (width - 1).bit_length()
    x_TE = jnp.pad(x_TE, ((0, 0), (0, size - width)))
    while size > 1:
        size //= 2
        x_TE = x_TE[:, :size] + x_TE[:, size:]
    return x_TE


class Router(nnx.Module):
    """Scores of each token for each expert, in float32: near ties decide which weights are used."""

    def __init__(self, dim: int, num_experts: int, dtype: str, *, bias: bool) -> None:
        self.weight = param((num_experts, dim), (None, "embed"), dtype)
        self.bias = param((num_experts,), (None,), dtype, init="zeros") if bias else None

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        return linear(x_TD, self.weight[...], bias, num_tokens=num_tokens, out_dtype=jnp.float32)


class Experts(nnx.Module):
    """The weights of all routed experts, stacked."""

    def __init__(self, dim: int, moe: MoEConfig, dtype: str) -> None:
        E, F = moe.num_experts, moe.moe_intermediate_size
        self.gate_up_proj = param((E, 2 * F, dim), ("experts", "mlp", "embed"), dtype)
        self.down_proj = param((E, dim, F), ("experts", "embed", "mlp"), dtype)

        def bias(rows: int, axis: str) -> nnx.Param | None:
            return param((E, rows), ("experts", axis), dtype, "zeros") if moe.bias else None

        self.gate_up_bias, self.down_bias = bias(2 * F, "mlp"), bias(dim, "embed")


class SparseMLP(nnx.Module):
    """Routed experts in the place of a decoder layer's MLP."""

    def __init__(self, dim: int, moe: MoEConfig, dtype: str) -> None:
        self.moe = moe
        self.gate = Router(dim, moe.num_experts, dtype, bias=moe.bias)
        self.experts = Experts(dim, moe, dtype)

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        ids_Tk, weights_Tk = route(
            self.gate(x_TD, num_tokens),
            self.moe.num_experts_per_tok,
            renormalise=self.moe.norm_topk_prob,
        )
        gate_up_bias, down_bias = self.experts.gate_up_bias, self.experts.down_bias
        return expert_mlp(
            x_TD,
            ids_Tk,
            weights_Tk,
            self.experts.gate_up_proj[...],
            self.experts.down_proj[...],
            num_tokens=num_tokens,
            gate_up_bias_EF=None if gate_up_bias is None else gate_up_bias[...],
            down_bias_ED=None if down_bias is None else down_bias[...],
            activation=self.moe.activation,
        )
