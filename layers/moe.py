"""Mixture of experts: a router picks a few MLPs for each token (arXiv:1701.06538, 2101.03961)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.param import param
from jengine.pallas_kernels.grouped_matmul.activation import ClampedSwiGLU
from jengine.pallas_kernels.grouped_matmul.api import expert_mlp
from jengine.pallas_kernels.linear.api import linear
from jengine.pallas_kernels.top_k_rows.api import top_k_rows


@dataclass(frozen=True)
class GroupedRouting:
    """DeepSeek's choice of experts: those of the few best groups only (arXiv:2405.04434)."""

    scoring: Literal["softmax", "sigmoid"]
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0  # of the weights, in the end
    has_bias: bool = False  # added to the scores for the choice, not for the weights


@dataclass(frozen=True)
class MoEConfig:
    """The numbers of a model's routed experts. Field names are Hugging Face's."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool  # the weights of a token's experts add up to one
    bias: bool = False  # of router and experts
    activation: ClampedSwiGLU | None = None  # in the place of SwiGLU
    grouped: GroupedRouting | None = None  # in the place of the softmax's largest


def route(logits_TE: jax.Array, top_k: int, *, renormalise: bool) -> tuple[jax.Array, jax.Array]:
    """(expert ids i32 [T, k], weights f32 [T, k]), the most probable expert first, equal ones by
    index. Weights are softmax probabilities over all experts, or over the chosen ones alone if
    `renormalise`.
    """
    top_Tk, ids_Tk = top_k_rows(logits_TE, top_k)
    scores_Tk = jnp.exp(top_Tk - top_Tk[:, :1])
    over = scores_Tk if renormalise else jnp.exp(logits_TE - top_Tk[:, :1])
    return ids_Tk, scores_Tk / _row_sums(over)


def route_grouped(
    logits_TE: jax.Array,
    bias_E: jax.Array | None,
    top_k: int,
    routing: GroupedRouting,
    *,
    renormalise: bool,
) -> tuple[jax.Array, jax.Array]:
    """As `route`, but the experts are chosen by score plus bias among those of the best groups.

    A group counts as much as its best expert, or with a bias its best two together.
    """
    if routing.scoring == "sigmoid":
        scores_TE = jax.nn.sigmoid(logits_TE)
    else:
        powers_TE = jnp.exp(logits_TE - top_k_rows(logits_TE, 1)[0])
        scores_TE = powers_TE / _row_sums(powers_TE)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E[None, :]
    if routing.top_groups < routing.num_groups:
        choice_TE = _best_groups_only(choice_TE, routing, best=1 if bias_E is None else 2)
    _, ids_Tk = top_k_rows(choice_TE, top_k)
    weights_Tk = jnp.take_along_axis(scores_TE, ids_Tk, axis=1)
    if renormalise:
        weights_Tk = weights_Tk / (_row_sums(weights_Tk) + 1e-20)
    return ids_Tk, weights_Tk * routing.scale


def _best_groups_only(choice_TE: jax.Array, routing: GroupedRouting, best: int) -> jax.Array:
    """-inf for experts of other groups than the best, by the sum of their `best` experts."""
    (T, E), G = choice_TE.shape, routing.num_groups
    tops, _ = top_k_rows(choice_TE.reshape(T * G, E // G), best)
    _, groups_Tg = top_k_rows(_row_sums(tops).reshape(T, G), routing.top_groups)
    group_E = jnp.arange(E, dtype=jnp.int32) // (E // G)
    is_in_TE = jnp.any(groups_Tg[:, :, None] == group_E[None, None, :], axis=1)
    return jnp.where(is_in_TE, choice_TE, -jnp.inf)


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
        has_bias = moe.grouped is not None and moe.grouped.has_bias
        self.e_score_correction_bias = (
            param((moe.num_experts,), (None,), "float32", "zeros") if has_bias else None
        )

    def choose(self, logits_TE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(expert ids, weights) of each token."""
        moe = self.moe
        top_k, renormalise = moe.num_experts_per_tok, moe.norm_topk_prob
        if moe.grouped is None:
            return route(logits_TE, top_k, renormalise=renormalise)
        bias_E = None if self.e_score_correction_bias is None else self.e_score_correction_bias[...]
        return route_grouped(logits_TE, bias_E, top_k, moe.grouped, renormalise=renormalise)

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        ids_Tk, weights_Tk = self.choose(self.gate(x_TD, num_tokens))
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
