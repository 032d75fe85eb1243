"""Qwen2-MoE and Qwen1.5-MoE (arXiv:2407.10671): Qwen2's attention; beside the routed experts one
that all tokens share, as far as a gate of its own lets it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax

from jengine.layers.linear import Linear
from jengine.layers.moe import SparseMLP, side_by_side
from jengine.loading.rules import WeightRule, WeightTable
from jengine.models.config_fields import ConfigFields
from jengine.models.decoder_weights import (
    HF_NAMES,
    attention_rules,
    frame_rules,
    ignored_tensors,
    linear_rules,
    mlp_rules,
    weight_rule,
)
from jengine.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from jengine.models.sparse import QWEN_NAMES, SparseConfig, expert_rules
from jengine.pallas_kernels.linear.reference import sum_of_parts
from jengine.sharding.split import Split

DEFAULTS = {  # where config.json may be silent and means something else than Llama's
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "qkv_bias": True,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(SparseConfig):
    """The shared numbers, read with Qwen2-MoE's defaults."""

    shared_expert_intermediate_size: int

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        hf = {**DEFAULTS, **hf}
        fields = ConfigFields(hf)
        layers = fields.integer("num_hidden_layers")
        if hf.get("layer_types") is None:
            hf["layer_types"] = layer_types(hf, layers)
        sparse = SparseConfig.from_hf(
            {**hf, "attention_bias": hf["qkv_bias"], "mlp_bias": False},
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )
        return cls(
            **{**vars(sparse), "attention_out_bias": False},
            shared_expert_intermediate_size=fields.integer("shared_expert_intermediate_size"),
        )

    def of_rank(self, split: Split) -> Self:
        field = "shared_expert_intermediate_size"
        size = split.share(self.shared_expert_intermediate_size, "mlp", field)
        return dataclasses.replace(super().of_rank(split), **{field: size})


def layer_types(hf: Mapping[str, Any], num_layers: int) -> list[str]:
    """Every other layer below `max_window_layers` has a window, if windows are used at all."""
    below = hf["max_window_layers"] if hf["use_sliding_window"] else 0
    return [
        "sliding_attention" if i % 2 == 0 and i < below else "full_attention"
        for i in range(num_layers)
    ]


class Qwen2MoeMLP(SparseMLP):
    """Routed experts and the shared one, side by side."""

    def __init__(self, cfg: Qwen2MoeConfig) -> None:
        super().__init__(cfg.hidden_size, cfg.moe, cfg.dtype)
        self.shared_expert = LlamaMLP(shared_config(cfg))
        self.shared_expert_gate = Linear(cfg.hidden_size, 1, (None, "embed"), cfg.dtype)

    def local_parts(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        share_T1 = jax.nn.sigmoid(self.shared_expert_gate(x_TD, num_tokens))
        shared_PTD = self.shared_expert.local_parts(x_TD, num_tokens)
        shared_TD = share_T1 * sum_of_parts(shared_PTD, x_TD.dtype)
        return side_by_side(super().local_parts(x_TD, num_tokens), shared_TD[None])


def shared_config(cfg: Qwen2MoeConfig) -> Qwen2MoeConfig:
    """Of the shared expert: an MLP of another width."""
    return dataclasses.replace(cfg, intermediate_size=cfg.shared_expert_intermediate_size)


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    config_class = Qwen2MoeConfig

    @staticmethod
    def decoder_layer(cfg: Qwen2MoeConfig, layer: int) -> LlamaDecoderLayer:
        mlp = Qwen2MoeMLP(cfg) if cfg.sparse_layers[layer] else LlamaMLP(cfg)
        return LlamaDecoderLayer(cfg, LlamaAttention(cfg, layer), mlp)

    @staticmethod
    def weight_table(cfg: Qwen2MoeConfig, dialect: str) -> WeightTable:
        del dialect  # Hugging Face's only
        rules = (
            *frame_rules(cfg, HF_NAMES),
            *attention_rules(cfg, HF_NAMES),
            *mlp_rules(cfg, HF_NAMES),  # of layers without experts
            *expert_rules(cfg, QWEN_NAMES),
            *shared_expert_rules(cfg),
        )
        return WeightTable(rules, ignored_tensors(cfg, HF_NAMES))


def shared_expert_rules(cfg: Qwen2MoeConfig) -> list[WeightRule]:
    D, F = cfg.hidden_size, cfg.shared_expert_intermediate_size
    source, target = "model.layers.{i}.mlp.shared_expert", "layers.{i}.mlp.shared_expert"
    gate_up = target + ".gate_up_proj"
    return [
        *linear_rules(source + ".gate_proj", gate_up, F, D, bias=False),
        *linear_rules(source + ".up_proj", gate_up, F, D, bias=False, offset=F),
        *linear_rules(source + ".down_proj", target + ".down_proj", D, F, bias=False),
        weight_rule(source + "_gate", target + "_gate", 1, D),
    ]
