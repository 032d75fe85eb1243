"""GLM-4-0414 (arXiv:2406.12793 and its models of 2025): norms on both sides of attention and MLP,
and the first half of each head rotated, by pairs that lie side by side.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jengine.layers.norm import RMSNorm
from jengine.loading.rules import WeightTable
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import (
    HF_NAMES,
    attention_rules,
    embedding_rules,
    ignored_tensors,
    weight_rule,
)
from jengine.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from jengine.models.phi3 import fused_mlp_rules
from jengine.models.sandwich import SandwichDecoderLayer, layer_norm_rules

DEFAULTS = {  # where config.json is silent
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
}
NORMS = {  # ours -> GLM's
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}


class Glm4Config(DecoderConfig):
    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        cfg = super().from_hf(
            {**DEFAULTS, **hf, "mlp_bias": False},
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )
        return dataclasses.replace(cfg, attention_out_bias=False)


class Glm4ForCausalLM(LlamaForCausalLM):
    config_class = Glm4Config

    @staticmethod
    def decoder_layer(cfg: DecoderConfig, layer: int) -> SandwichDecoderLayer:
        return SandwichDecoderLayer(cfg, LlamaAttention(cfg, layer), LlamaMLP(cfg), RMSNorm)

    @staticmethod
    def weight_table(cfg: DecoderConfig, dialect: str) -> WeightTable:
        del dialect  # Hugging Face's only
        rules = (
            *embedding_rules(cfg, HF_NAMES),
            weight_rule(HF_NAMES.norm, "norm", cfg.hidden_size),
            *layer_norm_rules(cfg, HF_NAMES, NORMS),
            *attention_rules(cfg, HF_NAMES, rotary_pairs=True),
            *fused_mlp_rules(cfg, HF_NAMES.layer + "mlp.gate_up_proj", HF_NAMES.down),
        )
        return WeightTable(rules, ignored_tensors(cfg, HF_NAMES))
