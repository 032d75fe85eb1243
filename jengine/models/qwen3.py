"""Qwen3, the dense models (arXiv:2505.09388): Llama with a norm on every head of q and k."""

from collections.abc import Mapping
from typing import Any, Self

from jengine.layers.norm import RMSNorm
from jengine.loading.rules import WeightRule, WeightTable
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import (
    TensorNames,
    attention_rules,
    frame_rules,
    ignored_tensors,
    mlp_rules,
    names_of,
    weight_rule,
)
from jengine.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP

DEFAULTS = {  # where Qwen3's config.json may be silent and means something else than Llama's
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "max_window_layers": 28,
}


class Qwen3Config(DecoderConfig):
    """The shared numbers, read with Qwen3's defaults."""

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        return super().from_hf(
            {**DEFAULTS, **hf, "mlp_bias": False},
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )


class Qwen3Attention(LlamaAttention):
    """Llama's attention; q and k are normalised head by head, which keeps their products bounded
    without biases.
    """

    def __init__(self, cfg: DecoderConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps, cfg.dtype, axis="head_dim")
        self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps, cfg.dtype, axis="head_dim")

    @property
    def head_norms(self) -> tuple[RMSNorm, RMSNorm]:
        return self.q_norm, self.k_norm


class Qwen3ForCausalLM(LlamaForCausalLM):
    config_class = Qwen3Config

    @staticmethod
    def decoder_layer(cfg: DecoderConfig, layer: int) -> LlamaDecoderLayer:
        return LlamaDecoderLayer(cfg, Qwen3Attention(cfg, layer), LlamaMLP(cfg))

    @staticmethod
    def weight_table(cfg: DecoderConfig, dialect: str) -> WeightTable:
        names = names_of(dialect)
        rules = (
            *frame_rules(cfg, names),
            *attention_rules(cfg, names),
            *head_norm_rules(cfg, names),
            *mlp_rules(cfg, names),
        )
        return WeightTable(rules, ignored_tensors(cfg, names))


def head_norm_rules(cfg: DecoderConfig, names: TensorNames) -> list[WeightRule]:
    return [
        weight_rule(names.q_norm, "layers.{i}.self_attn.q_norm", cfg.head_dim),
        weight_rule(names.k_norm, "layers.{i}.self_attn.k_norm", cfg.head_dim),
    ]
