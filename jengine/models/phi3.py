"""Phi-3 and Phi-4 mini (arXiv:2404.14219): Llama with fused projections in the checkpoint, LongRoPE
and, in some, a rotation of a part of each head.
"""

from collections.abc import Mapping
from typing import Any, Self

from jengine.loading.rules import WeightRule, WeightTable
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import (
    frame_rules,
    ignored_tensors,
    linear_rules,
    names_of,
)
from jengine.models.llama import LlamaForCausalLM

DEFAULTS = {  # where config.json is silent
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
ALWAYS = {"attention_bias": False, "mlp_bias": False}


class Phi3Config(DecoderConfig):
    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        hf = {**DEFAULTS, **hf, **ALWAYS}
        name = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
        return super().from_hf(
            {**hf, name: long_rope(hf.get(name) or {}, hf["original_max_position_embeddings"])},
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )


def long_rope(scaling: Mapping[str, Any], original_max_position: int) -> dict[str, Any]:
    """LongRoPE's parameters under today's names: "su", and the "yarn" of early files, mean it."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {
        "original_max_position_embeddings": original_max_position,
        **scaling,
        "rope_type": "longrope" if kind in ("su", "yarn") else kind,
    }


class Phi3ForCausalLM(LlamaForCausalLM):
    config_class = Phi3Config

    @staticmethod
    def weight_table(cfg: DecoderConfig, dialect: str) -> WeightTable:
        names = names_of(dialect)
        N, K, H = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        D, at = cfg.hidden_size, "layers.{i}.self_attn."
        qkv = names.layer + ("attn_qkv" if dialect == "gguf" else "self_attn.qkv_proj")
        gate_up = names.layer + ("ffn_up" if dialect == "gguf" else "mlp.gate_up_proj")
        rules = (
            *frame_rules(cfg, names),
            *linear_rules(qkv, at + "qkv_proj", (N + 2 * K) * H, D, bias=False),
            *linear_rules(names.o, at + "o_proj", D, N * H, bias=False),
            *fused_mlp_rules(cfg, gate_up, names.down),
        )
        return WeightTable(rules, ignored_tensors(cfg, names))


def fused_mlp_rules(cfg: DecoderConfig, gate_up: str, down: str) -> list[WeightRule]:
    """Where the checkpoint holds gate and up as we do, under these names."""
    D, F, at = cfg.hidden_size, cfg.intermediate_size, "layers.{i}.mlp."
    return [
        *linear_rules(gate_up, at + "gate_up_proj", 2 * F, D, bias=False),
        *linear_rules(down, at + "down_proj", D, F, bias=False),
    ]
