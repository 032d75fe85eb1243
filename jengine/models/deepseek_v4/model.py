"""DeepSeek-V4 (arXiv:2606.19348): residual streams that mix, attention over a window and compressed
entries, experts in every layer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.kv_spec import KVSpec
from jengine.layers.attention import AttentionMetadata
from jengine.layers.norm import WideRMSNorm
from jengine.loading.rules import WeightTable
from jengine.models.deepseek_v4.attention import CompressedAttention
from jengine.models.deepseek_v4.caches import LayerCaches, cache_specs, layer_caches
from jengine.models.deepseek_v4.config import Compression, DeepseekV4Config
from jengine.models.deepseek_v4.hyper_connections import HyperConnection, HyperHead
from jengine.models.deepseek_v4.moe import DeepseekV4MoE
from jengine.models.deepseek_v4.step_context import StepContext, build_context
from jengine.models.deepseek_v4.weights import DRAFTS, weight_rules
from jengine.models.llama import LlamaForCausalLM


class DeepseekV4Layer(nnx.Module):
    """Two blocks, each with a hyper-connection around it and a norm before it."""

    def __init__(
        self,
        cfg: DeepseekV4Config,
        compression: Compression | None,
        caches: LayerCaches,
        *,
        by_id: bool,
    ) -> None:
        D, eps, dtype = cfg.hidden_size, cfg.rms_norm_eps, cfg.dtype
        self.attn_hc = HyperConnection(D, cfg.hyper, eps)
        self.attn_norm = WideRMSNorm(D, eps, dtype)
        self.attn = CompressedAttention(cfg, compression, caches)
        self.ffn_hc = HyperConnection(D, cfg.hyper, eps)
        self.ffn_norm = WideRMSNorm(D, eps, dtype)
        self.ffn = DeepseekV4MoE(cfg, by_id=by_id)

    def __call__(
        self,
        streams_TCD: jax.Array,
        token_ids_T: jax.Array,
        kv: list[jax.Array],
        context: StepContext,
    ) -> jax.Array:
        """The streams after the layer. Replaces its arrays in `kv`."""
        num_tokens = context.metadata.num_tokens
        x_TD, mixing = self.attn_hc.read(streams_TCD, self.attn_norm, num_tokens)
        y_TD = self.attn(x_TD, kv, context)
        streams_TCD = mixing.join(y_TD, streams_TCD)
        x_TD, mixing = self.ffn_hc.read(streams_TCD, self.ffn_norm, num_tokens)
        y_TD = self.ffn(x_TD, token_ids_T, num_tokens)
        return mixing.join(y_TD, streams_TCD)


class DeepseekV4ForCausalLM(LlamaForCausalLM):
    """`kv` holds the caches that `kv_specs` lists: entries, windows, states of compressors."""

    config_class = DeepseekV4Config
    norm_class = WideRMSNorm

    cfg: DeepseekV4Config

    def __init__(self, cfg: DeepseekV4Config) -> None:
        super().__init__(cfg)
        self.hc_head = HyperHead(cfg.hidden_size, cfg.hyper, cfg.rms_norm_eps)

    def __call__(
        self, token_ids_T: jax.Array, kv: Sequence[jax.Array], metadata: AttentionMetadata
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns (hidden [T, D] after the last norm, kv). `kv` is consumed."""
        streams_TCD, kv = self.streams(token_ids_T, kv, metadata)
        hidden_TD = self.hc_head(streams_TCD, metadata.num_tokens)
        return self.norm(hidden_TD, metadata.num_tokens), kv

    def streams(
        self, token_ids_T: jax.Array, kv: Sequence[jax.Array], metadata: AttentionMetadata
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """(streams [T, c, D] after the last layer, kv): what a draft block goes on from."""
        arrays, context = list(kv), build_context(self.cfg, kv, metadata)
        x_TD = self.embed_tokens(token_ids_T)
        streams_TCD = jnp.repeat(x_TD[:, None], self.cfg.hyper.num_streams, axis=1)
        for layer in self.layers:
            streams_TCD = layer(streams_TCD, token_ids_T, arrays, context)
        return streams_TCD, tuple(arrays)

    @staticmethod
    def decoder_layer(cfg: Any, layer: int) -> DeepseekV4Layer:
        caches, by_id = layer_caches(cfg)[layer], layer < cfg.num_hash_layers
        return DeepseekV4Layer(cfg, cfg.compressions[layer], caches, by_id=by_id)

    @staticmethod
    def kv_specs(cfg: Any) -> tuple[KVSpec, ...]:
        return cache_specs(cfg)

    @staticmethod
    def weight_table(cfg: Any, dialect: str) -> WeightTable:
        del dialect  # DeepSeek's own only
        return WeightTable(weight_rules(cfg), (DRAFTS + ".*",))
