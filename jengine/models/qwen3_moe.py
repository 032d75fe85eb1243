"""Qwen3-MoE (arXiv:2505.09388): Qwen3's attention, and routed experts in most layers."""

from collections.abc import Mapping
from typing import Any, Self

from jengine.layers.moe import SparseMLP
from jengine.loading.rules import WeightTable
from jengine.models.decoder_weights import (
    HF_NAMES,
    attention_rules,
    frame_rules,
    ignored_tensors,
    mlp_rules,
)
from jengine.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from jengine.models.qwen3 import Qwen3Attention, head_norm_rules
from jengine.models.sparse import QWEN_NAMES, SparseConfig, expert_rules

DEFAULTS = {  # where config.json may be silent and means something else than Llama's
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
# Qwen3's config.json has this one too, but here no layer attends fully beside others with a window.
ALWAYS = {"max_window_layers": 0, "mlp_bias": False}


class Qwen3MoeConfig(SparseConfig):
    """The shared numbers, read with Qwen3-MoE's defaults."""

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        return super().from_hf(
            {**DEFAULTS, **hf, **ALWAYS},
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    config_class = Qwen3MoeConfig

    @staticmethod
    def decoder_layer(cfg: SparseConfig, layer: int) -> LlamaDecoderLayer:
        mlp = (
            SparseMLP(cfg.hidden_size, cfg.moe, cfg.dtype)
            if cfg.sparse_layers[layer]
            else LlamaMLP(cfg)
        )
        return LlamaDecoderLayer(cfg, Qwen3Attention(cfg, layer), mlp)

    @staticmethod
    def weight_table(cfg: SparseConfig, dialect: str) -> WeightTable:
        del dialect  # Hugging Face's only
        rules = (
            *frame_rules(cfg, HF_NAMES),
            *attention_rules(cfg, HF_NAMES),
            *head_norm_rules(cfg, HF_NAMES),
            *mlp_rules(cfg, HF_NAMES),  # of layers without experts
            *expert_rules(cfg, QWEN_NAMES),
        )
        return WeightTable(rules, ignored_tensors(cfg, HF_NAMES))
