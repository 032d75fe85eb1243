"""Mixture of experts: a router picks a few MLPs for each token (arXiv:1701.06538, 2101.03961)."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.expert_exchange import (
    Exchange,
    capacity,
    choose_exchange,
    gather_and_scatter,
    send_and_return,
)
from jengine.layers.expert_slots import ExpertSlots, choose_slots, count_slots, slot_table
from jengine.layers.linear import sum_of_ranks
from jengine.layers.param import Size, param, weight_param
from jengine.pallas_kernels.grouped_matmul.activation import ClampedSwiGLU
from jengine.pallas_kernels.grouped_matmul.api import expert_parts
from jengine.pallas_kernels.linear.api import linear
from jengine.pallas_kernels.packed import Packing
from jengine.pallas_kernels.route_experts.api import GroupedRouting, route, route_grouped
from jengine.sharding import collectives
from jengine.sharding.split import Split


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
    num_local_experts: int | None = None  # of one rank; None: all
    packing: Packing | None = None  # of the experts' weights; None: arrays of the model's dtype
    slots: ExpertSlots | None = None  # None: experts lie where their ids say
    exchange: Exchange = "auto"  # of tokens, where data ranks share the experts out

    @property
    def num_places(self) -> int:
        """For experts, on all ranks."""
        return self.num_experts if self.slots is None else self.slots.num_slots

    def of_rank(self, split: Split) -> Self:
        """Raises `ValueError` naming a field that does not divide."""
        size = self.moe_intermediate_size
        field = "num_experts" if self.slots is None else "num_experts + num_redundant_experts"
        return dataclasses.replace(
            self,
            num_local_experts=split.share(self.num_places, "experts", field),
            moe_intermediate_size=split.share(size, "expert_mlp", "moe_intermediate_size"),
        )


class Router(nnx.Module):
    """Scores of each token for each expert, in float32: near ties decide which weights are used."""

    def __init__(self, dim: int, num_experts: int, dtype: str, *, bias: bool) -> None:
        self.weight = param((num_experts, dim), (None, "embed"), dtype)
        self.bias = param((num_experts,), (None,), dtype, init="zeros") if bias else None

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        return linear(x_TD, self.weight[...], bias, num_tokens=num_tokens, out_dtype=jnp.float32)


class Experts(nnx.Module):
    """The weights of all routed experts, or of those of one rank, stacked."""

    def __init__(self, dim: int, moe: MoEConfig, dtype: str) -> None:
        self.moe = moe
        E = moe.num_experts if moe.num_local_experts is None else moe.num_local_experts
        F = moe.moe_intermediate_size
        gate_up_axes, down_axes = (
            ("experts", "expert_mlp", "embed"), ("experts", "embed", "expert_mlp")
        )  # fmt: skip
        self.gate_up_proj = weight_param((E, (F, F), dim), gate_up_axes, dtype, moe.packing)
        self.down_proj = weight_param((E, dim, F), down_axes, dtype, moe.packing)

        def bias(rows: Size, axis: str) -> nnx.Param | None:
            return param((E, rows), ("experts", axis), dtype, "zeros") if moe.bias else None

        self.gate_up_bias, self.down_bias = bias((F, F), "expert_mlp"), bias(dim, "embed")
        self.slots = None if moe.slots is None else slot_table(moe.num_experts, moe.slots)

    def local_parts(
        self, x_TD: jax.Array, ids_Tk: jax.Array, weights_Tk: jax.Array, num_tokens: jax.Array
    ) -> jax.Array:
        """[P, T, D], as `LlamaMLP.parts`, of what this rank's experts add to tokens that chose
        among all: all ranks see all tokens. Where ranks have other tokens and other experts, theirs
        come here and the results go back.
        """
        if self.slots is not None:
            ids_Tk = choose_slots(ids_Tk, self.slots[...], x_TD)
            self.load = count_slots(ids_Tk, num_tokens, self.moe.num_places)
        if not collectives.are_split_together("tokens", "experts"):
            return self._of_experts(x_TD, ids_Tk, weights_Tk, num_tokens)
        is_real_T1 = jnp.arange(x_TD.shape[0], dtype=jnp.int32)[:, None] < num_tokens
        ids_Tk = jnp.where(is_real_T1, ids_Tk, self.moe.num_places)  # nobody's
        return self._of_other_ranks(x_TD, ids_Tk, weights_Tk)

    def _of_other_ranks(
        self, x_TD: jax.Array, places_Tk: jax.Array, weights_Tk: jax.Array
    ) -> jax.Array:
        """[1, T, D]: what all data ranks' experts add to this one's tokens."""

        def of_experts(x_TD: jax.Array, places_Tk: jax.Array, weights_Tk: jax.Array) -> jax.Array:
            num_tokens = jnp.int32(x_TD.shape[0])
            return self._of_experts(x_TD, places_Tk, weights_Tk, num_tokens)

        (T, k), num_ranks = places_Tk.shape, collectives.ways_of("tokens")
        if choose_exchange(self.moe.exchange, T, k, num_ranks) == "allgather_reducescatter":
            return gather_and_scatter(x_TD, places_Tk, weights_Tk, of_experts)
        return send_and_return(
            x_TD,
            places_Tk,
            weights_Tk,
            of_experts,
            num_places=self.moe.num_places,
            num_local=self.down_proj[...].shape[0],
            capacity=capacity(T, k, num_ranks),
        )

    def _of_experts(
        self, x_TD: jax.Array, ids_Tk: jax.Array, weights_Tk: jax.Array, num_tokens: jax.Array
    ) -> jax.Array:
        """Summands of what this rank's experts add to tokens. Ids are places, of all ranks."""
        gate_up_EFD, down_EDF = self.gate_up_proj[...], self.down_proj[...]
        gate_up_bias, down_bias = self.gate_up_bias, self.down_bias
        num_experts = down_EDF.shape[0]
        num_all = None
        if num_experts < self.moe.num_places:
            num_all = self.moe.num_places
            ids_Tk = ids_Tk - collectives.rank_in("experts") * num_experts
            is_ours_Tk = (ids_Tk >= 0) & (ids_Tk < num_experts)
            ids_Tk = jnp.where(is_ours_Tk, ids_Tk, num_experts)
        if down_bias is not None:
            down_bias = collectives.once_over(down_bias[...], "expert_mlp")
        return expert_parts(
            x_TD,
            ids_Tk,
            weights_Tk,
            gate_up_EFD,
            down_EDF,
            num_tokens=num_tokens,
            gate_up_bias_EF=None if gate_up_bias is None else gate_up_bias[...],
            down_bias_ED=down_bias,
            activation=self.moe.activation,
            num_experts=num_all,
        )


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

    def parts(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """[P, T, D], as `LlamaMLP.parts`; unspecified at or past `num_tokens`."""
        local_PTD = self.local_parts(x_TD, num_tokens)
        return sum_of_ranks(local_PTD, num_tokens, "experts", "expert_mlp")

    def local_parts(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """As `parts`, of what this rank adds."""
        ids_Tk, weights_Tk = self.choose(self.gate(x_TD, num_tokens))
        return self.experts.local_parts(x_TD, ids_Tk, weights_Tk, num_tokens)


def side_by_side(routed_PTD: jax.Array, shared_PTD: jax.Array) -> jax.Array:
    """The summands of routed and shared experts as those of one result."""
    if routed_PTD.dtype != shared_PTD.dtype:
        routed_PTD, shared_PTD = routed_PTD.astype(jnp.float32), shared_PTD.astype(jnp.float32)
    return jnp.concatenate([routed_PTD, shared_PTD])
