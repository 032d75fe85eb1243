"""Experts of DeepSeek-V4: a few of many by their scores, in the first layers by the
token's id, beside one that sees every token.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.linear import Linear
from jengine.layers.moe import Experts, Router, side_by_side
from jengine.layers.param import param
from jengine.models.deepseek_v4.config import DeepseekV4Config
from jengine.pallas_kernels.grouped_matmul.api import expert_parts
from jengine.pallas_kernels.linear.reference import sum_of_parts
from jengine.pallas_kernels.route_experts.api import route_given, route_grouped
from jengine.pallas_kernels.silu_mul.api import silu_mul


class SharedExpert(nnx.Module):
    """A SwiGLU MLP, clamped as the routed ones are."""

    def __init__(self, cfg: DeepseekV4Config) -> None:
        D, F = cfg.hidden_size, cfg.shared_intermediate_size
        self.activation = cfg.moe.activation
        dtype, packing = cfg.dtype, cfg.packing
        self.gate_up_proj = Linear(D, 2 * F, ("mlp", "embed"), dtype, packing=packing)
        self.down_proj = Linear(F, D, ("embed", "mlp"), dtype, packing=packing)

    def parts(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """[P, T, D]: summands of the result."""
        gate_up_TF2 = self.gate_up_proj(x_TD, num_tokens)
        if self.activation is None:
            product_TF = silu_mul(gate_up_TF2, num_tokens=num_tokens)
        else:
            product_TF = self.activation(gate_up_TF2)
        return self.down_proj.parts(product_TF, num_tokens)


class DeepseekV4MoE(nnx.Module):
    """`by_id`: experts are looked up by the token's id; their weights are scores all the same."""

    def __init__(self, cfg: DeepseekV4Config, *, by_id: bool) -> None:
        D, moe = cfg.hidden_size, cfg.moe
        self.moe = moe
        self.gate = Router(D, moe.num_experts, cfg.dtype, bias=False)
        self.experts = Experts(D, moe, cfg.dtype)
        self.shared_experts = SharedExpert(cfg)
        shape = (cfg.vocab_size, moe.num_experts_per_tok)
        self.tid2eid = param(shape, ("vocab", None), "int32", "columns") if by_id else None
        self.bias = None if by_id else param((moe.num_experts,), (None,), "float32", "zeros")

    def __call__(self, x_TD: jax.Array, token_ids_T: jax.Array, num_tokens: jax.Array) -> jax.Array:
        ids_Tk, weights_Tk = self.choose(self.gate(x_TD, num_tokens), token_ids_T)
        routed_PTD = expert_parts(
            x_TD,
            ids_Tk,
            weights_Tk,
            self.experts.gate_up_proj[...],
            self.experts.down_proj[...],
            num_tokens=num_tokens,
            activation=self.moe.activation,
        )
        shared_PTD = self.shared_experts.parts(x_TD, num_tokens)
        return sum_of_parts(side_by_side(routed_PTD, shared_PTD), x_TD.dtype)

    def choose(self, logits_TE: jax.Array, token_ids_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(expert ids, weights) of each token."""
        moe = self.moe
        assert moe.grouped is not None  # from_hf sets it
        if self.tid2eid is None:
            bias_E = None if self.bias is None else self.bias[...]
            return route_grouped(
                logits_TE, bias_E, moe.num_experts_per_tok, moe.grouped,
                renormalise=moe.norm_topk_prob,
            )  # fmt: skip
        ids_Tk = self.tid2eid[...].at[token_ids_T].get(mode="clip")
        weights_Tk = route_given(logits_TE, ids_Tk, moe.grouped, renormalise=moe.norm_topk_prob)
        return ids_Tk, weights_Tk.astype(jnp.float32)
