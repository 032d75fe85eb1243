"""Gemma 3, the text models (arXiv:2503.19786): Gemma 2 with norms on the heads of q and k in place
of the soft caps, and five layers with a window, rotated by a base of their own, to each that
attends fully.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jengine.layers.norm import WideRMSNorm
from jengine.layers.rope import build_rope
from jengine.loading.rules import WeightTable
from jengine.models.config_fields import ConfigFields, periodic_layer_types
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import ignored_tensors, names_of, weight_rule
from jengine.models.gemma2 import Gemma2ForCausalLM, gemma_rules, gemma_scales, norm_scale
from jengine.models.llama import LlamaAttention, LlamaMLP
from jengine.models.sandwich import SandwichDecoderLayer

DEFAULTS = {  # where config.json is silent
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4


class Gemma3Config(DecoderConfig):
    positions_are_scaled = True

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        hf = {**DEFAULTS, **hf}
        fields = ConfigFields(hf)
        fields.require("use_bidirectional_attention", (None, False), default=None)
        types = periodic_layer_types(
            fields.integer("num_hidden_layers"), fields.integer("sliding_window_pattern")
        )
        full, local = rope_parameters(hf)
        cfg = super().from_hf(
            {
                **hf,
                "hidden_act": hf.get("hidden_activation") or "gelu_pytorch_tanh",
                "layer_types": hf.get("layer_types") or types,
                "rope_parameters": full,
            },
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )
        window_rope = build_rope(
            cfg.head_dim, local["rope_theta"], local, cfg.max_position_embeddings, max_model_len
        )
        return dataclasses.replace(cfg, window_rope=window_rope, **gemma_scales(hf, cfg))


def rope_parameters(hf: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of full attention and of windows: from `rope_parameters` by layer type (transformers 5), or
    `rope_theta`, `rope_scaling` (of full attention only) and `rope_local_base_freq`.
    """
    given = hf.get("rope_parameters") or {
        "full_attention": {
            **(hf.get("rope_scaling") or {}),
            "rope_theta": hf.get("rope_theta", GLOBAL_THETA),
        },
        "sliding_attention": {"rope_theta": hf.get("rope_local_base_freq", LOCAL_THETA)},
    }
    full = {"rope_theta": GLOBAL_THETA, **(given.get("full_attention") or {})}
    return full, {"rope_theta": LOCAL_THETA, **(given.get("sliding_attention") or {})}


class Gemma3Attention(LlamaAttention):
    """q and k are normalised head by head. In bfloat16 these norms round before the scale too,
    other than Hugging Face's: the one kernel that norms, rotates and writes does so.
    """

    def __init__(self, cfg: DecoderConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        self.q_norm = WideRMSNorm(cfg.head_dim, cfg.rms_norm_eps, cfg.dtype, axis="head_dim")
        self.k_norm = WideRMSNorm(cfg.head_dim, cfg.rms_norm_eps, cfg.dtype, axis="head_dim")

    @property
    def head_norms(self) -> tuple[WideRMSNorm, WideRMSNorm]:
        return self.q_norm, self.k_norm


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    config_class = Gemma3Config

    @staticmethod
    def decoder_layer(cfg: DecoderConfig, layer: int) -> SandwichDecoderLayer:
        return SandwichDecoderLayer(cfg, Gemma3Attention(cfg, layer), LlamaMLP(cfg), WideRMSNorm)

    @staticmethod
    def weight_table(cfg: DecoderConfig, dialect: str) -> WeightTable:
        names, at, H = names_of(dialect), "layers.{i}.self_attn.", cfg.head_dim
        scale = norm_scale(dialect)
        rules = (
            *gemma_rules(cfg, dialect),
            weight_rule(names.q_norm, at + "q_norm", H, transform=scale),
            weight_rule(names.k_norm, at + "k_norm", H, transform=scale),
        )
        return WeightTable(rules, ignored_tensors(cfg, names))
