"""OLMo 2 (arXiv:2501.00656): norms after attention and MLP instead of before, and over all of q and
all of k.
"""

from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.attention import AttentionMetadata
from jengine.layers.norm import WideRMSNorm
from jengine.loading.rules import WeightTable
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import (
    HF_NAMES,
    attention_rules,
    embedding_rules,
    ignored_tensors,
    mlp_rules,
    weight_rule,
)
from jengine.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from jengine.models.sandwich import layer_norm_rules

NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


class Olmo2Config(DecoderConfig):
    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        return super().from_hf(
            {"rms_norm_eps": 1e-5, **hf, "mlp_bias": False},
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )


class Olmo2Attention(LlamaAttention):
    """q and k are normalised as projected, before they are cut into heads."""

    def __init__(self, cfg: DecoderConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        self.q_dim = cfg.num_attention_heads * cfg.head_dim
        self.k_dim = cfg.num_key_value_heads * cfg.head_dim
        self.q_norm = WideRMSNorm(self.q_dim, cfg.rms_norm_eps, cfg.dtype, axis="heads")
        self.k_norm = WideRMSNorm(self.k_dim, cfg.rms_norm_eps, cfg.dtype, axis="heads")

    def project(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        qkv_TX = self.qkv_proj(x_TD, num_tokens)
        q_TX, k_TX, v_TX = jnp.split(qkv_TX, (self.q_dim, self.q_dim + self.k_dim), axis=1)
        q_TX, k_TX = self.q_norm(q_TX, num_tokens), self.k_norm(k_TX, num_tokens)
        return jnp.concatenate([q_TX, k_TX, v_TX], axis=1)[None]


class Olmo2DecoderLayer(nnx.Module):
    """The residual stream goes in as it is; what comes out is normalised and added."""

    def __init__(self, cfg: DecoderConfig, layer: int) -> None:
        self.self_attn = Olmo2Attention(cfg, layer)
        self.post_attention_layernorm = WideRMSNorm(cfg.hidden_size, cfg.rms_norm_eps, cfg.dtype)
        self.mlp = LlamaMLP(cfg)
        self.post_feedforward_layernorm = WideRMSNorm(cfg.hidden_size, cfg.rms_norm_eps, cfg.dtype)

    def __call__(
        self,
        x_TD: jax.Array,
        added_PTD: jax.Array | None,
        kv_pages: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        del added_PTD  # None: every layer adds up what it gives
        num_tokens = metadata.num_tokens
        attended_TD, kv_pages = self.self_attn(x_TD, kv_pages, metadata, rotation)
        x_TD = x_TD + self.post_attention_layernorm(attended_TD, num_tokens)
        fed_TD = self.mlp(x_TD, num_tokens)
        return x_TD + self.post_feedforward_layernorm(fed_TD, num_tokens), None, kv_pages


class Olmo2ForCausalLM(LlamaForCausalLM):
    config_class = Olmo2Config
    norm_class = WideRMSNorm

    @staticmethod
    def decoder_layer(cfg: DecoderConfig, layer: int) -> Olmo2DecoderLayer:
        return Olmo2DecoderLayer(cfg, layer)

    @staticmethod
    def weight_table(cfg: DecoderConfig, dialect: str) -> WeightTable:
        del dialect  # Hugging Face's only
        names, at, H = HF_NAMES, "layers.{i}.self_attn.", cfg.head_dim
        rules = (
            *embedding_rules(cfg, names),
            weight_rule(names.norm, "norm", cfg.hidden_size),
            *layer_norm_rules(cfg, names, {name: name for name in NORMS}),
            *attention_rules(cfg, names),
            weight_rule(names.q_norm, at + "q_norm", cfg.num_attention_heads * H),
            weight_rule(names.k_norm, at + "k_norm", cfg.num_key_value_heads * H),
            *mlp_rules(cfg, names),
        )
        return WeightTable(rules, ignored_tensors(cfg, names))
