"""Gemma 2 (arXiv:2408.00118): norms on both sides of attention and MLP with scales of 1 + w, soft
caps on the scores and on the logits, windows in every other layer, GeGLU.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from jengine.layers.norm import WideRMSNorm
from jengine.loading.rules import WeightRule, WeightTable
from jengine.models.config_fields import ConfigFields, periodic_layer_types
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import (
    Transform,
    attention_rules,
    embedding_rules,
    ignored_tensors,
    mlp_rules,
    names_of,
    weight_rule,
)
from jengine.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from jengine.models.sandwich import SandwichDecoderLayer, layer_norm_rules

DEFAULTS = {  # where config.json is silent
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
PERIOD = 2  # of full attention
NORMS = {  # ours, named as in Hugging Face's files: GGUF's
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


class Gemma2Config(DecoderConfig):
    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        hf = {**DEFAULTS, **hf}
        fields = ConfigFields(hf)
        fields.require("use_bidirectional_attention", (None, False), default=None)
        types = periodic_layer_types(fields.integer("num_hidden_layers"), PERIOD)
        cfg = super().from_hf(
            {
                **hf,
                "hidden_act": hf.get("hidden_activation") or "gelu_pytorch_tanh",
                "layer_types": hf.get("layer_types") or types,
            },
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )
        return dataclasses.replace(cfg, **gemma_scales(hf, cfg))


def gemma_scales(hf: Mapping[str, Any], cfg: DecoderConfig) -> dict[str, Any]:
    """The fields in which Gemma's arithmetic differs. The embedding's scale is rounded to the
    model's dtype, as the models were trained.
    """
    return {
        "attention_scale": float(hf["query_pre_attn_scalar"]) ** -0.5,
        "attention_soft_cap": hf.get("attn_logit_softcapping"),
        "embedding_scale": float(np.asarray(cfg.hidden_size**0.5, jnp.dtype(cfg.dtype))),
        "logit_soft_cap": hf.get("final_logit_softcapping"),
    }


class Gemma2ForCausalLM(LlamaForCausalLM):
    config_class = Gemma2Config
    norm_class = WideRMSNorm

    @staticmethod
    def decoder_layer(cfg: DecoderConfig, layer: int) -> SandwichDecoderLayer:
        return SandwichDecoderLayer(cfg, LlamaAttention(cfg, layer), LlamaMLP(cfg), WideRMSNorm)

    @staticmethod
    def weight_table(cfg: DecoderConfig, dialect: str) -> WeightTable:
        return WeightTable(
            tuple(gemma_rules(cfg, dialect)), ignored_tensors(cfg, names_of(dialect))
        )


def gemma_rules(cfg: DecoderConfig, dialect: str) -> list[WeightRule]:
    names, scale = names_of(dialect), norm_scale(dialect)
    sources = NORMS if dialect == "gguf" else {name: name for name in NORMS}
    return [
        *embedding_rules(cfg, names),
        weight_rule(names.norm, "norm", cfg.hidden_size, transform=scale),
        *layer_norm_rules(cfg, names, sources, scale),
        *attention_rules(cfg, names),
        *mlp_rules(cfg, names),
    ]


def norm_scale(dialect: str) -> Transform | None:
    """From a stored norm to its scale. GGUF files hold the scale itself."""
    return None if dialect == "gguf" else one_plus


def one_plus(weight: np.ndarray) -> np.ndarray:
    """A norm's scale, in float32: once at load instead of in every step."""
    return 1.0 + weight.astype(np.float32)
