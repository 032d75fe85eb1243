"""Mixtral (arXiv:2401.04088): Mistral's attention, and routed experts in every layer."""

from collections.abc import Mapping
from typing import Any, Self

from jengine.layers.moe import SparseMLP
from jengine.loading.rules import WeightTable
from jengine.models.decoder_weights import (
    HF_NAMES,
    attention_rules,
    frame_rules,
    ignored_tensors,
)
from jengine.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from jengine.models.sparse import ExpertNames, SparseConfig, expert_rules

DEFAULTS = {  # where config.json may be silent and means something else than Llama's
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
ALWAYS = {"attention_bias": False, "mlp_bias": False, "norm_topk_prob": True}
NAMES = ExpertNames(
    router="model.layers.{i}.block_sparse_moe.gate",
    gate="model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    up="model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    down="model.layers.{i}.block_sparse_moe.experts.{e}.w2",
)


class MixtralConfig(SparseConfig):
    """The shared numbers, read with Mixtral's defaults. An expert is what an MLP would be."""

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        return super().from_hf(
            {**DEFAULTS, **hf, **ALWAYS, "moe_intermediate_size": hf.get("intermediate_size")},
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )


class MixtralForCausalLM(LlamaForCausalLM):
    config_class = MixtralConfig

    @staticmethod
    def decoder_layer(cfg: SparseConfig, layer: int) -> LlamaDecoderLayer:
        mlp = SparseMLP(cfg.hidden_size, cfg.moe, cfg.dtype)
        return LlamaDecoderLayer(cfg, LlamaAttention(cfg, layer), mlp)

    @staticmethod
    def weight_table(cfg: SparseConfig, dialect: str) -> WeightTable:
        del dialect  # Hugging Face's only
        rules = (
            *frame_rules(cfg, HF_NAMES),
            *attention_rules(cfg, HF_NAMES),
            *expert_rules(cfg, NAMES),
        )
        return WeightTable(rules, ignored_tensors(cfg, HF_NAMES))
