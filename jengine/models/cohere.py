"""Cohere's Command R (2024) and Command R7B, A: attention and MLP side by side on one LayerNorm,
scaled logits, rotary pairs that lie side by side. Command R7B and A (`cohere2`) rotate only where
a window is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.attention import AttentionMetadata
from jengine.layers.norm import LayerNorm, centre
from jengine.layers.param import param
from jengine.layers.rope import RopeTable
from jengine.loading.rules import WeightRule, WeightTable
from jengine.models.config_fields import ConfigFields, periodic_layer_types
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import (
    HF_NAMES,
    attention_rules,
    embedding_rules,
    ignored_tensors,
    mlp_rules,
    undo_rotary_pairs,
    weight_rule,
)
from jengine.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from jengine.pallas_kernels.rms_norm.api import rms_norm

DEFAULTS = {  # where config.json is silent
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
}
COHERE_THETA = 500000.0
COHERE2_DEFAULTS = {**DEFAULTS, "sliding_window": 4096, "sliding_window_pattern": 4}


@dataclasses.dataclass(frozen=True)
class CohereConfig(DecoderConfig):
    use_qk_norm: bool = False

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        hf = {**DEFAULTS, "rope_theta": COHERE_THETA, **hf, "mlp_bias": False}
        cfg = super().from_hf(
            {**hf, "rms_norm_eps": hf["layer_norm_eps"]},
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )
        use_qk_norm = bool(hf.get("use_qk_norm"))
        return dataclasses.replace(
            cfg, logit_scale=float(hf["logit_scale"]), use_qk_norm=use_qk_norm
        )


class Cohere2Config(CohereConfig):
    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        hf = {**COHERE2_DEFAULTS, **hf, "use_qk_norm": False}
        fields = ConfigFields(hf)
        types = periodic_layer_types(
            fields.integer("num_hidden_layers"), fields.integer("sliding_window_pattern")
        )
        cfg = super().from_hf(
            {"rope_theta": 10000.0, **hf, "layer_types": hf.get("layer_types") or types},
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )
        unmoved = RopeTable((0.0,) * len(cfg.rope.inv_freq))  # turns by nothing, bit for bit
        return dataclasses.replace(cfg, rope=unmoved, window_rope=cfg.rope)


class HeadsLayerNorm(nnx.Module):
    """A LayerNorm of every head, each with its own scales."""

    def __init__(self, heads: int, head_dim: int, eps: float) -> None:
        self.eps = eps
        self.weight = param((heads, head_dim), ("heads", "head_dim"), "float32", init="ones")

    def __call__(self, x_TX: jax.Array, num_tokens: jax.Array) -> jax.Array:
        N, H = self.weight.shape
        rows = centre(x_TX.astype(jnp.float32).reshape(-1, H), num_tokens * N)
        ones_H = jnp.ones((H,), jnp.float32)
        rows = rms_norm(rows, ones_H, eps=self.eps, num_tokens=num_tokens * N)
        normed_TNH = rows.reshape(-1, N, H) * self.weight[...][None]
        return normed_TNH.reshape(x_TX.shape).astype(x_TX.dtype)


class CohereAttention(LlamaAttention):
    """Command R+ normalises the heads of q and k."""

    def __init__(self, cfg: CohereConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        N, K, H = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.q_dim, self.k_dim = N * H, K * H
        self.q_norm = HeadsLayerNorm(N, H, cfg.rms_norm_eps) if cfg.use_qk_norm else None
        self.k_norm = HeadsLayerNorm(K, H, cfg.rms_norm_eps) if cfg.use_qk_norm else None

    def project(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        qkv_TX = self.qkv_proj(x_TD, num_tokens)
        if self.q_norm is None or self.k_norm is None:
            return qkv_TX[None]
        q_TX, k_TX, v_TX = jnp.split(qkv_TX, (self.q_dim, self.q_dim + self.k_dim), axis=1)
        q_TX, k_TX = self.q_norm(q_TX, num_tokens), self.k_norm(k_TX, num_tokens)
        return jnp.concatenate([q_TX, k_TX, v_TX], axis=1)[None]


class CohereDecoderLayer(nnx.Module):
    """Attention and MLP read the same normalised rows; both are added at once."""

    def __init__(self, cfg: CohereConfig, layer: int) -> None:
        self.input_layernorm = LayerNorm(cfg.hidden_size, cfg.rms_norm_eps, cfg.dtype)
        self.self_attn = CohereAttention(cfg, layer)
        self.mlp = LlamaMLP(cfg)

    def __call__(
        self,
        x_TD: jax.Array,
        added_PTD: jax.Array | None,
        kv_pages: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        del added_PTD  # None: every layer adds up what it gives
        normed_TD = self.input_layernorm(x_TD, metadata.num_tokens)
        attended_TD, kv_pages = self.self_attn(normed_TD, kv_pages, metadata, rotation)
        return x_TD + attended_TD + self.mlp(normed_TD, metadata.num_tokens), None, kv_pages


class CohereForCausalLM(LlamaForCausalLM):
    config_class = CohereConfig
    norm_class = LayerNorm

    @staticmethod
    def decoder_layer(cfg: CohereConfig, layer: int) -> CohereDecoderLayer:
        return CohereDecoderLayer(cfg, layer)

    @staticmethod
    def weight_table(cfg: CohereConfig, dialect: str) -> WeightTable:
        del dialect  # Hugging Face's only
        names, D = HF_NAMES, cfg.hidden_size
        rules = (
            *embedding_rules(cfg, names),
            weight_rule(names.norm, "norm", D),
            weight_rule(names.input_norm, "layers.{i}.input_layernorm", D),
            *attention_rules(cfg, names, rotary_pairs=True),
            *(heads_norm_rules(cfg) if cfg.use_qk_norm else ()),
            *mlp_rules(cfg, names),
        )
        return WeightTable(rules, ignored_tensors(cfg, names))


class Cohere2ForCausalLM(CohereForCausalLM):
    config_class = Cohere2Config


def heads_norm_rules(cfg: CohereConfig) -> list[WeightRule]:
    """Their scales follow the entries of q and k that are put in another order at load."""
    H = cfg.head_dim

    def rule(source: str, target: str, heads: int) -> WeightRule:
        undo = undo_rotary_pairs(heads, H, H)
        return weight_rule(
            source,
            f"layers.{{i}}.self_attn.{target}",
            heads,
            H,
            transform=lambda weight: undo(weight.reshape(-1)).reshape(weight.shape),
        )

    return [
        rule(HF_NAMES.q_norm, "q_norm", cfg.num_attention_heads),
        rule(HF_NAMES.k_norm, "k_norm", cfg.num_key_value_heads),
    ]
