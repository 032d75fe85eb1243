"""DeepSeek-V2 and V2-Lite (arXiv:2405.04434): multi-head latent attention; routed experts beside
shared ones, which see every token.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jengine.kv_spec import KVKind, KVSpec
from jengine.layers.mla import LatentAttention, MLAConfig
from jengine.layers.moe import GroupedRouting, SparseMLP, side_by_side
from jengine.loading.rules import WeightRule, WeightTable
from jengine.models.config_fields import ConfigFields
from jengine.models.decoder_weights import (
    HF_NAMES,
    frame_rules,
    ignored_tensors,
    linear_rules,
    mlp_rules,
    undo_rotary_pairs,
    weight_rule,
)
from jengine.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from jengine.models.sparse import QWEN_NAMES, SparseConfig, expert_rules
from jengine.sharding.split import Split

DEFAULTS = {  # where config.json may be silent and means something else than Llama's
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(SparseConfig):
    """The shared numbers, and those of latents and shared experts."""

    mla: MLAConfig
    shared_intermediate_size: int  # of all shared experts together
    rope_interleave: bool  # the checkpoint keeps the two rows that rotate together side by side
    num_extra_layers: int  # that predict further tokens; not used

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        fields = ConfigFields(hf := {**DEFAULTS, **hf})
        fields.require("scoring_func", ("softmax",), default="softmax")
        # transformers ignores it, the authors' code does not: no published model has it.
        fields.require("norm_topk_prob", (False, None), default=False)
        routing = GroupedRouting("softmax", scale=float(hf["routed_scaling_factor"]))
        method = fields.require("topk_method", ("greedy", "group_limited_greedy"), "greedy")
        if method == "group_limited_greedy":
            routing = dataclasses.replace(
                routing,
                num_groups=fields.integer("n_group"),
                top_groups=fields.integer("topk_group"),
            )
        return cls.from_fields(
            hf, routing, dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len
        )

    @classmethod
    def from_fields(
        cls,
        hf: Mapping[str, Any],
        routing: GroupedRouting,
        *,
        dtype: str,
        kv_dtype: str,
        max_model_len: int,
    ) -> Self:
        """What V2 and V3 read alike."""
        fields = ConfigFields(hf)
        fields.require("moe_layer_freq", (1,), default=1)
        q_lora_rank = None if hf["q_lora_rank"] is None else fields.integer("q_lora_rank")
        if q_lora_rank is None:  # the bias would be of a part of the fused projection
            fields.require("attention_bias", (False,), default=False)
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        mla = MLAConfig(q_lora_rank, **{name: fields.integer(name) for name in names})
        sparse = SparseConfig.from_hf(
            {
                **hf,
                "head_dim": mla.qk_rope_head_dim,  # what rotates
                "num_local_experts": fields.integer("n_routed_experts"),
                "mlp_only_layers": range(hf["first_k_dense_replace"] or 0),
                "decoder_sparse_step": 1,
                "mlp_bias": False,
            },
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )
        replaced = {
            "attention_scale": mla.qk_head_dim**-0.5 * yarn_factor(fields.rope()[1]) ** 2,
            "moe": dataclasses.replace(sparse.moe, grouped=routing),
        }
        return cls(
            **{**vars(sparse), **replaced},
            mla=mla,
            shared_intermediate_size=sparse.moe.moe_intermediate_size
            * fields.integer("n_shared_experts"),
            rope_interleave=bool(hf.get("rope_interleave", True)),
            num_extra_layers=hf.get("num_nextn_predict_layers") or 0,
        )

    def of_rank(self, split: Split) -> Self:
        size, field = self.shared_intermediate_size, "moe_intermediate_size times n_shared_experts"
        return dataclasses.replace(
            super().of_rank(split), shared_intermediate_size=split.share(size, "mlp", field)
        )


def yarn_factor(scaling: Mapping[str, Any] | None) -> float:
    """By which YaRN grows the scores' two factors, where `mscale_all_dim` asks for it."""
    scaling = scaling or {}
    kind, weight = scaling.get("rope_type", scaling.get("type")), scaling.get("mscale_all_dim")
    if kind in (None, "default") or not weight or scaling["factor"] <= 1:
        return 1.0
    return 0.1 * weight * math.log(scaling["factor"]) + 1.0


class DeepseekMoE(SparseMLP):
    """Routed experts and the shared ones, side by side."""

    def __init__(self, cfg: DeepseekV2Config) -> None:
        super().__init__(cfg.hidden_size, cfg.moe, cfg.dtype)
        shared = dataclasses.replace(cfg, intermediate_size=cfg.shared_intermediate_size)
        self.shared_experts = LlamaMLP(shared)

    def local_parts(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        shared_PTD = self.shared_experts.local_parts(x_TD, num_tokens)
        return side_by_side(super().local_parts(x_TD, num_tokens), shared_PTD)


class DeepseekV2ForCausalLM(LlamaForCausalLM):
    config_class = DeepseekV2Config

    @staticmethod
    def decoder_layer(cfg: DeepseekV2Config, layer: int) -> LlamaDecoderLayer:
        attention = LatentAttention(
            cfg.hidden_size,
            cfg.num_attention_heads,
            cfg.mla,
            cfg.dtype,
            layer=layer,
            scale=cfg.attention_scale,
            bias=cfg.attention_bias,
        )
        mlp = DeepseekMoE(cfg) if cfg.sparse_layers[layer] else LlamaMLP(cfg)
        return LlamaDecoderLayer(cfg, attention, mlp)

    @staticmethod
    def kv_specs(cfg: Any) -> tuple[KVSpec, ...]:
        itemsize = np.dtype(jnp.dtype(cfg.kv_dtype)).itemsize
        spec = KVSpec(KVKind.MLA, (cfg.mla.entry_dim,), cfg.kv_dtype, itemsize)
        return (spec,) * cfg.num_hidden_layers

    @staticmethod
    def weight_table(cfg: DeepseekV2Config, dialect: str) -> WeightTable:
        del dialect  # Hugging Face's only
        rules = (
            *frame_rules(cfg, HF_NAMES),
            *latent_attention_rules(cfg),
            *mlp_rules(cfg, HF_NAMES),  # of layers without experts
            *expert_rules(cfg, QWEN_NAMES),
            *shared_expert_rules(cfg),
        )
        last = cfg.num_hidden_layers
        extra = [f"model.layers.{last + i}.*" for i in range(cfg.num_extra_layers)]
        return WeightTable(rules, (*ignored_tensors(cfg, HF_NAMES), *extra))


def latent_attention_rules(cfg: DeepseekV2Config) -> list[WeightRule]:
    mla, N, D, bias = cfg.mla, cfg.num_attention_heads, cfg.hidden_size, cfg.attention_bias
    C, P, R, V = mla.kv_lora_rank, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
    H = mla.qk_head_dim
    undo_q, undo_k = (
        undo_rotary_pairs(heads, first + R, R, first) if cfg.rope_interleave else None
        for heads, first in ((N, P), (1, C))
    )
    theirs, ours = "model.layers.{i}.self_attn.", "layers.{i}.self_attn."
    qkv_a = ours + "qkv_a_proj"
    if mla.q_lora_rank is None:
        q_rows = N * H
        rules = linear_rules(theirs + "q_proj", qkv_a, q_rows, D, bias=False, transform=undo_q)
    else:
        q_rows = mla.q_lora_rank
        q_b, q_a_norm = "q_b_proj", "q_a_layernorm"
        rules = [
            *linear_rules(theirs + "q_a_proj", qkv_a, q_rows, D, bias=bias),
            *linear_rules(theirs + q_b, ours + q_b, N * H, q_rows, bias=False, transform=undo_q),
            weight_rule(theirs + q_a_norm, ours + q_a_norm, q_rows),
        ]
    kv_a = theirs + "kv_a_proj_with_mqa"
    return [
        *rules,
        *linear_rules(kv_a, qkv_a, C + R, D, bias=bias, offset=q_rows, transform=undo_k),
        weight_rule(theirs + "kv_a_layernorm", ours + "kv_a_layernorm", C),
        *expansion_rules(theirs + "kv_b_proj.weight", ours, N, P, V, C),
        *linear_rules(theirs + "o_proj", ours + "o_proj", D, N * V, bias=bias),
    ]


def expansion_rules(source: str, target: str, N: int, P: int, V: int, C: int) -> list[WeightRule]:
    """`kv_b_proj` holds, for each head, what expands a latent to its key and to its value."""

    def keys(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(N, P + V, C)[:, :P].swapaxes(1, 2)

    def values(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(N, P + V, C)[:, P:]

    shape = (N * (P + V), C)
    return [
        WeightRule(
            source, target + "up_k", shape, transform=keys, transformed=(N, C, P), is_part=True
        ),
        WeightRule(
            source, target + "up_v", shape, transform=values, transformed=(N, V, C), is_part=True
        ),
    ]


def shared_expert_rules(cfg: DeepseekV2Config) -> list[WeightRule]:
    D, F = cfg.hidden_size, cfg.shared_intermediate_size
    source, target = "model.layers.{i}.mlp.shared_experts", "layers.{i}.mlp.shared_experts"
    gate_up = target + ".gate_up_proj"
    return [
        *linear_rules(source + ".gate_proj", gate_up, F, D, bias=False),
        *linear_rules(source + ".up_proj", gate_up, F, D, bias=False, offset=F),
        *linear_rules(source + ".down_proj", target + ".down_proj", D, F, bias=False),
    ]
