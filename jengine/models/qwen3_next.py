"""Qwen3-Next: Gated DeltaNet (arXiv:2412.06464) in three of four layers, gated attention in the
fourth; routed experts beside a shared one with a gate of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from jengine.kv_spec import KVSpec
from jengine.layers.gated_delta import DeltaConfig
from jengine.layers.norm import WideRMSNorm
from jengine.loading.rules import WeightRule, WeightTable
from jengine.models import gated_hybrid
from jengine.models.config_fields import ConfigFields
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
from jengine.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeMLP, shared_expert_rules
from jengine.models.sparse import QWEN_NAMES, SparseConfig, expert_rules
from jengine.sharding.split import Split

DEFAULTS = {  # where config.json may be silent and means something else than Llama's
    **gated_hybrid.DEFAULTS,
    "num_key_value_heads": 2,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(Qwen2MoeConfig):
    """The numbers of the experts, and of the layers that do not attend."""

    delta: DeltaConfig
    linear_layers: tuple[bool, ...]

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        hf = {**DEFAULTS, **hf}
        sparse = SparseConfig.from_hf(
            attention_fields(hf), dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len
        )
        shared = ConfigFields(hf).integer("shared_expert_intermediate_size")
        return cls(**vars(sparse), **delta_fields(hf), shared_expert_intermediate_size=shared)

    def of_rank(self, split: Split) -> Self:
        return dataclasses.replace(super().of_rank(split), delta=self.delta.of_rank(split))


class Qwen3NextForCausalLM(LlamaForCausalLM):
    config_class = Qwen3NextConfig
    norm_class = WideRMSNorm

    @staticmethod
    def decoder_layer(cfg: Qwen3NextConfig, layer: int) -> LlamaDecoderLayer:
        mlp = Qwen2MoeMLP(cfg) if cfg.sparse_layers[layer] else LlamaMLP(cfg)
        delta = cfg.delta if cfg.linear_layers[layer] else None
        return hybrid_layer(cfg, delta, layer, mlp)

    @staticmethod
    def kv_specs(cfg: Any) -> tuple[KVSpec, ...]:
        return hybrid_kv_specs(cfg, cfg.delta, cfg.linear_layers)

    @staticmethod
    def weight_table(cfg: Qwen3NextConfig, dialect: str) -> WeightTable:
        del dialect  # Hugging Face's only
        rules = (
            *hybrid_rules(cfg, cfg.delta),
            *grouped_projection_rules(cfg.delta, cfg.hidden_size),
            *mlp_rules(cfg, HF_NAMES),  # of layers without experts
            *expert_rules(cfg, QWEN_NAMES),
            *shared_expert_rules(cfg),
        )
        return WeightTable(rules, hybrid_ignored(cfg))


def grouped_projection_rules(delta: DeltaConfig, D: int) -> list[WeightRule]:
    """The two projections keep together what belongs to a key head; ours what is of a kind."""
    values = delta.value_dim // delta.num_key_heads  # of one key head
    share = delta.num_value_heads // delta.num_key_heads

    def by_kind(*sizes: int) -> Any:
        stops = np.cumsum(sizes)[:-1]

        def transform(rows: np.ndarray) -> np.ndarray:
            heads = rows.reshape(delta.num_key_heads, -1, D)
            return np.concatenate([x.reshape(-1, D) for x in np.split(heads, stops, axis=1)])

        return transform

    theirs, H = "model.layers.{i}.linear_attn.", delta.key_head_dim
    qkvz, ba = "in_proj_qkvz", "in_proj_ba"
    rows_qkvz, rows_ba = delta.conv_dim + delta.value_dim, 2 * delta.num_value_heads
    to_qkvz, to_ba = by_kind(H, H, values, values), by_kind(share, share)
    return [
        *linear_rules(theirs + qkvz, MIXER + qkvz, rows_qkvz, D, bias=False, transform=to_qkvz),
        *linear_rules(theirs + ba, MIXER + ba, rows_ba, D, bias=False, transform=to_ba),
    ]
