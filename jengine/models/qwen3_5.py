"""Qwen3.5, the dense text models: Qwen3-Next's layers with a plain MLP, and their projections apart
in the checkpoint. Its rotation has sections for images, which are one for text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jengine.kv_spec import KVSpec
from jengine.layers.gated_delta import DeltaConfig
from jengine.layers.norm import WideRMSNorm
from jengine.loading.rules import WeightRule, WeightTable
from jengine.models import gated_hybrid
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import HF_NAMES, linear_rules, mlp_rules
from jengine.models.gated_hybrid import (
    MIXER,
    attention_fields,
    delta_fields,
    hybrid_ignored,
    hybrid_kv_specs,
    hybrid_layer,
    hybrid_rules,
)
from jengine.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from jengine.sharding.split import Split

DEFAULTS = {**gated_hybrid.DEFAULTS, "num_key_value_heads": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen35Config(DecoderConfig):
    """The shared numbers, and those of the layers that do not attend."""

    delta: DeltaConfig
    linear_layers: tuple[bool, ...]

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        hf = {**DEFAULTS, **hf}
        dense = DecoderConfig.from_hf(
            attention_fields(hf), dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len
        )
        return cls(**vars(dense), **delta_fields(hf))

    def of_rank(self, split: Split) -> Self:
        return dataclasses.replace(super().of_rank(split), delta=self.delta.of_rank(split))


class Qwen35ForCausalLM(LlamaForCausalLM):
    config_class = Qwen35Config
    norm_class = WideRMSNorm

    @staticmethod
    def decoder_layer(cfg: Qwen35Config, layer: int) -> LlamaDecoderLayer:
        delta = cfg.delta if cfg.linear_layers[layer] else None
        return hybrid_layer(cfg, delta, layer, LlamaMLP(cfg))

    @staticmethod
    def kv_specs(cfg: Any) -> tuple[KVSpec, ...]:
        return hybrid_kv_specs(cfg, cfg.delta, cfg.linear_layers)

    @staticmethod
    def weight_table(cfg: Qwen35Config, dialect: str) -> WeightTable:
        del dialect  # Hugging Face's only
        rules = (
            *hybrid_rules(cfg, cfg.delta),
            *projection_rules(cfg.delta, cfg.hidden_size),
            *mlp_rules(cfg, HF_NAMES),
        )
        return WeightTable(rules, hybrid_ignored(cfg))


def projection_rules(delta: DeltaConfig, D: int) -> list[WeightRule]:
    theirs, N = "model.layers.{i}.linear_attn.in_proj_", delta.num_value_heads
    qkvz, ba, C = MIXER + "in_proj_qkvz", MIXER + "in_proj_ba", delta.conv_dim
    return [
        *linear_rules(theirs + "qkv", qkvz, C, D, bias=False),
        *linear_rules(theirs + "z", qkvz, delta.value_dim, D, bias=False, offset=C),
        *linear_rules(theirs + "b", ba, N, D, bias=False),
        *linear_rules(theirs + "a", ba, N, D, bias=False, offset=N),
    ]
