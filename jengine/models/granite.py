"""Granite 3 (IBM): Llama with four multipliers, of the embedding, the scores, what each block adds
and the logits, which hold their scale across model sizes (muP, arXiv:2203.03466).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax

from jengine.layers.attention import AttentionMetadata
from jengine.layers.linear import scaled
from jengine.models.decoder_config import DecoderConfig
from jengine.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP


@dataclasses.dataclass(frozen=True)
class GraniteConfig(DecoderConfig):
    residual_multiplier: float = 1.0

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        cfg = super().from_hf(hf, dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len)
        return dataclasses.replace(
            cfg,
            attention_scale=float(hf.get("attention_multiplier", 1.0)),
            embedding_scale=float(hf.get("embedding_multiplier", 1.0)),
            logit_scale=1.0 / float(hf.get("logits_scaling", 1.0)),
            residual_multiplier=float(hf.get("residual_multiplier", 1.0)),
        )


class GraniteDecoderLayer(LlamaDecoderLayer):
    """Llama's block, of which each half adds a fraction only."""

    def __init__(self, cfg: GraniteConfig, layer: int) -> None:
        super().__init__(cfg, LlamaAttention(cfg, layer), LlamaMLP(cfg))
        self.residual_multiplier = cfg.residual_multiplier

    def __call__(
        self,
        x_TD: jax.Array,
        added_PTD: jax.Array | None,
        kv_pages: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        del added_PTD  # None: every layer adds up what it gives
        attended_TD, kv_pages = self.self_attn(
            self.input_layernorm(x_TD, metadata.num_tokens), kv_pages, metadata, rotation
        )
        x_TD = x_TD + scaled(attended_TD, self.residual_multiplier)
        normed_TD = self.post_attention_layernorm(x_TD, metadata.num_tokens)
        fed_TD = self.mlp(normed_TD, metadata.num_tokens)
        return x_TD + scaled(fed_TD, self.residual_multiplier), None, kv_pages


class GraniteForCausalLM(LlamaForCausalLM):
    config_class = GraniteConfig

    @staticmethod
    def decoder_layer(cfg: GraniteConfig, layer: int) -> GraniteDecoderLayer:
        return GraniteDecoderLayer(cfg, layer)
