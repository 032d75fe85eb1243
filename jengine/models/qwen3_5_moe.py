"""Qwen3.5-MoE, the text models: Qwen3-Next with experts everywhere and Qwen3.5's projections."""

from collections.abc import Mapping
from typing import Any, Self

from jengine.loading.rules import WeightTable
from jengine.models.gated_hybrid import hybrid_ignored, hybrid_rules
from jengine.models.qwen2_moe import shared_expert_rules
from jengine.models.qwen3_5 import projection_rules
from jengine.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from jengine.models.sparse import QWEN_NAMES, expert_rules

DEFAULTS = {"num_experts": 256, "num_experts_per_tok": 8}  # where it differs from Qwen3-Next
# No layer is dense, and the weights of a token's experts always add up to one.
ALWAYS = {
    "mlp_only_layers": None,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "intermediate_size": 1,
}


class Qwen35MoeConfig(Qwen3NextConfig):
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


class Qwen35MoeForCausalLM(Qwen3NextForCausalLM):
    config_class = Qwen35MoeConfig

    @staticmethod
    def weight_table(cfg: Qwen3NextConfig, dialect: str) -> WeightTable:
        del dialect  # Hugging Face's only
        rules = (
            *hybrid_rules(cfg, cfg.delta),
            *projection_rules(cfg.delta, cfg.hidden_size),
            *expert_rules(cfg, QWEN_NAMES),
            *shared_expert_rules(cfg),
        )
        return WeightTable(rules, hybrid_ignored(cfg))
