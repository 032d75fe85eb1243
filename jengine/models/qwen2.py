"""Qwen2 and Qwen2.5, the dense models (arXiv:2407.10671): Llama with biases on q, k and v, and a
window in the layers from `max_window_layers` on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jengine.loading.rules import WeightTable
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import (
    attention_rules,
    frame_rules,
    ignored_tensors,
    mlp_rules,
    names_of,
)
from jengine.models.llama import LlamaForCausalLM

DEFAULTS = {  # where Qwen2's config.json may be silent and means something else than Llama's
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
ALWAYS = {"attention_bias": True, "mlp_bias": False}


class Qwen2Config(DecoderConfig):
    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        cfg = super().from_hf(
            {**DEFAULTS, **hf, **ALWAYS},
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )
        return dataclasses.replace(cfg, attention_out_bias=False)


class Qwen2ForCausalLM(LlamaForCausalLM):
    config_class = Qwen2Config

    @staticmethod
    def weight_table(cfg: DecoderConfig, dialect: str) -> WeightTable:
        names = names_of(dialect)
        rules = (
            *frame_rules(cfg, names),
            *attention_rules(cfg, names),
            *mlp_rules(cfg, names),
        )
        return WeightTable(rules, ignored_tensors(cfg, names))
