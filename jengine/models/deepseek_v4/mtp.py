"""Multi-token prediction of DeepSeek-V4: a block that, from what the model made of a token and from
the token after it, drafts the one after that.

Such a block has a window of its own and no compressed entries; embedding and head are the model's.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from jengine.kv_spec import KVSpec
from jengine.layers.attention import AttentionMetadata
from jengine.layers.linear import Linear
from jengine.layers.norm import WideRMSNorm
from jengine.loading.rules import WeightTable
from jengine.models.decoder_weights import linear_rules, weight_rule
from jengine.models.deepseek_v4.caches import LayerCaches, cache_specs, window_spec
from jengine.models.deepseek_v4.config import DeepseekV4Config
from jengine.models.deepseek_v4.hyper_connections import HyperHead
from jengine.models.deepseek_v4.model import DeepseekV4ForCausalLM, DeepseekV4Layer
from jengine.models.deepseek_v4.step_context import build_context
from jengine.models.deepseek_v4.weights import DRAFTS, head_rules, layer_rules, weight_rules


class DraftBlock(DeepseekV4Layer):
    """A layer whose streams are the model's, joined with the next token's embedding."""

    def __init__(self, cfg: DeepseekV4Config, caches: LayerCaches) -> None:
        super().__init__(cfg, None, caches, by_id=False)
        D, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.enorm, self.hnorm = WideRMSNorm(D, eps, cfg.dtype), WideRMSNorm(D, eps, cfg.dtype)
        self.e_proj = Linear(D, D, ("embed", None), cfg.dtype, packing=cfg.packing)
        self.h_proj = Linear(D, D, ("embed", None), cfg.dtype, packing=cfg.packing)
        self.hc_head = HyperHead(D, cfg.hyper, eps)
        self.norm = WideRMSNorm(D, eps, cfg.dtype)

    def joined(
        self, streams_TCD: jax.Array, embedded_TD: jax.Array, num_tokens: jax.Array
    ) -> jax.Array:
        """[T, c, D]: the layer's input."""
        T, c, D = streams_TCD.shape
        e_TD = self.e_proj(self.enorm(embedded_TD, num_tokens), num_tokens)
        rows = streams_TCD.reshape(T * c, D)
        rows = self.h_proj(self.hnorm(rows, num_tokens * c), num_tokens * c)
        return rows.reshape(T, c, D) + e_TD[:, None]


class DeepseekV4MTPForCausalLM(DeepseekV4ForCausalLM):
    """The model with its first draft block, which a step does not run by itself."""

    def __init__(self, cfg: DeepseekV4Config) -> None:
        super().__init__(cfg)
        self.mtp = nnx.List([DraftBlock(cfg, LayerCaches(window=len(cache_specs(cfg))))])

    def draft(
        self,
        streams_TCD: jax.Array,
        next_token_ids_T: jax.Array,
        kv: Sequence[jax.Array],
        metadata: AttentionMetadata,
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """(hidden [T, D], whose `logits` predict the token after the next; streams for another
        draft; kv). `streams` are those of the step that `metadata` describes, `next_token_ids` the
        tokens after its own."""
        arrays, num_tokens = list(kv), metadata.num_tokens
        context = build_context(self.cfg, kv, metadata)
        (block,) = self.mtp
        streams_TCD = block.joined(streams_TCD, self.embed_tokens(next_token_ids_T), num_tokens)
        streams_TCD = block(streams_TCD, next_token_ids_T, arrays, context)
        hidden_TD = block.norm(block.hc_head(streams_TCD, num_tokens), num_tokens)
        return hidden_TD, streams_TCD, tuple(arrays)

    @staticmethod
    def kv_specs(cfg: Any) -> tuple[KVSpec, ...]:
        """The block's window comes last."""
        return (*cache_specs(cfg), window_spec(cfg))

    @staticmethod
    def weight_table(cfg: Any, dialect: str) -> WeightTable:
        del dialect
        D, block = cfg.hidden_size, DRAFTS + ".{i}."
        norms, projections = ("enorm", "hnorm", "norm"), ("e_proj", "h_proj")
        return WeightTable(
            (
                *weight_rules(cfg),
                *layer_rules(cfg, block),
                *head_rules(cfg, block, block),
                *(weight_rule(block + name, block + name, D) for name in norms),
                *(
                    rule
                    for name in projections
                    for rule in linear_rules(
                        block + name, block + name, D, D, bias=False, packing=cfg.packing
                    )
                ),
            )
        )
