"""Experts of DeepSeek-V4: a few of many by their scores, in the first layers by the
token's id, beside one that sees every token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.linear import Linear, sum_of_ranks
from jengine.layers.moe import SparseMLP, side_by_side
from jengine.layers.param import param
from jengine.models.deepseek_v4.config import DeepseekV4Config
from jengine.pallas_kernels.linear.reference import sum_of_parts
from jengine.pallas_kernels.route_experts.api import route_given
from jengine.pallas_kernels.silu_mul.api import silu_mul
from jengine.sharding import collectives


class SharedExpert(nnx.Module):
    """A SwiGLU MLP, clamped as the routed ones are."""

    def __init__(self, cfg: DeepseekV4Config) -> None:
        D, F = cfg.hidden_size, cfg.shared_intermediate_size
        self.activation = cfg.moe.activation
        dtype, packing = cfg.dtype, cfg.packing
        self.gate_up_proj = Linear(D, (F, F), ("mlp", "embed"), dtype, packing=packing)
        self.down_proj = Linear(F, D, ("embed", "mlp"), dtype, packing=packing)

    def local_parts(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """[P, T, D]: summands of what this rank adds to the result."""
        gate_up_TF2 = self.gate_up_proj(x_TD, num_tokens)
        if self.activation is None:
            product_TF = silu_mul(gate_up_TF2, num_tokens=num_tokens)
        else:
            product_TF = self.activation(gate_up_TF2)
        return self.down_proj.local_parts(product_TF, num_tokens)


class DeepseekV4MoE(SparseMLP):
    """`by_id`: experts are looked up by the token's id; their weights are scores all the same."""

    def __init__(self, cfg: DeepseekV4Config, *, by_id: bool) -> None:
        assert cfg.moe.grouped is not None  # from_hf sets it
        grouped = dataclasses.replace(cfg.moe.grouped, has_bias=not by_id)
        super().__init__(cfg.hidden_size, dataclasses.replace(cfg.moe, grouped=grouped), cfg.dtype)
        self.shared_experts = SharedExpert(cfg)
        shape = (cfg.vocab_size, cfg.moe.num_experts_per_tok)
        self.tid2eid = param(shape, ("vocab", None), "int32", "columns") if by_id else None

    def __call__(self, x_TD: jax.Array, token_ids_T: jax.Array, num_tokens: jax.Array) -> jax.Array:
        logits_TE = self.gate(x_TD, num_tokens)
        if self.tid2eid is None:
            ids_Tk, weights_Tk = self.choose(logits_TE)
        else:
            ids_Tk, weights_Tk = self.look_up(logits_TE, self.tid2eid[...], token_ids_T)
        routed_PTD = self.experts.local_parts(x_TD, ids_Tk, weights_Tk, num_tokens)
        local_PTD = side_by_side(routed_PTD, self.shared_experts.local_parts(x_TD, num_tokens))
        parts_PTD = sum_of_ranks(local_PTD, num_tokens, "experts", "expert_mlp")
        return sum_of_parts(parts_PTD, x_TD.dtype)

    def look_up(
        self, logits_TE: jax.Array, table_Vk: jax.Array, token_ids_T: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """As `choose`, of the experts that a table of the vocabulary names."""
        num_rows, moe = table_Vk.shape[0], self.moe
        assert moe.grouped is not None
        row_T = token_ids_T
        if collectives.ways("vocab") > 1:
            row_T = token_ids_T - collectives.rank_in("vocab") * num_rows
        ids_Tk = table_Vk[jnp.clip(row_T, 0, num_rows - 1)]
        if collectives.ways("vocab") > 1:
            is_ours_T1 = ((row_T >= 0) & (row_T < num_rows))[:, None]
            ids_Tk = collectives.sum_over(jnp.where(is_ours_T1, ids_Tk, 0), "vocab")
        weights_Tk = route_given(logits_TE, ids_Tk, moe.grouped, renormalise=moe.norm_topk_prob)
        return ids_Tk, weights_Tk.astype(jnp.float32)
