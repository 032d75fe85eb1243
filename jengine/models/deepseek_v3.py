"""DeepSeek-V3 and R1 (arXiv:2412.19437), Kimi K2 (arXiv:2507.20534): V2's attention; experts are
chosen by sigmoid scores and a bias that balances their load.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jengine.layers.moe import GroupedRouting
from jengine.loading.rules import WeightRule, WeightTable
from jengine.models.config_fields import ConfigFields
from jengine.models.deepseek_v2 import DeepseekV2Config, DeepseekV2ForCausalLM

DEFAULTS = {  # where config.json may be silent and means something else than Llama's
    "max_position_embeddings": 4096,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


class DeepseekV3Config(DeepseekV2Config):
    """V2's numbers, read with V3's defaults."""

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        fields = ConfigFields(hf := {**DEFAULTS, **hf})
        fields.require("scoring_func", ("sigmoid",), default="sigmoid")
        fields.require("topk_method", ("noaux_tc",), default="noaux_tc")
        routing = GroupedRouting(
            "sigmoid",
            num_groups=fields.integer("n_group"),
            top_groups=fields.integer("topk_group"),
            scale=float(hf["routed_scaling_factor"]),
            has_bias=True,
        )
        return cls.from_fields(
            hf, routing, dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len
        )


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    config_class = DeepseekV3Config

    @staticmethod
    def weight_table(cfg: DeepseekV2Config, dialect: str) -> WeightTable:
        table = DeepseekV2ForCausalLM.weight_table(cfg, dialect)
        bias = WeightRule(
            "model.layers.{i}.mlp.gate.e_score_correction_bias",
            "layers.{i}.mlp.e_score_correction_bias",
            (cfg.moe.num_experts,),
        )
        return dataclasses.replace(table, rules=(*table.rules, bias))
