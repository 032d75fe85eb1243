"""gpt-oss (arXiv:2508.10925): routed experts with biases and a clamped SwiGLU, attention with sinks
and a window in every other layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np

from jengine.layers.moe import SparseMLP
from jengine.layers.param import param
from jengine.loading.quantization import quant_method
from jengine.loading.rules import WeightRule, WeightTable
from jengine.models.config_fields import ConfigFields, periodic_layer_types
from jengine.models.decoder_weights import (
    HF_NAMES,
    attention_rules,
    frame_rules,
    ignored_tensors,
    linear_rules,
)
from jengine.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from jengine.models.sparse import SparseConfig
from jengine.pallas_kernels.grouped_matmul.activation import ClampedSwiGLU
from jengine.pallas_kernels.packed import MXFP4

DEFAULTS = {  # where config.json may be silent and means something else than Llama's
    "head_dim": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
}
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
ALWAYS = {"mlp_bias": False, "norm_topk_prob": True}


class GptOssConfig(SparseConfig):
    """The shared numbers, read with gpt-oss's defaults. An expert is what an MLP would be."""

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        layers = ConfigFields(hf).integer("num_hidden_layers")
        hf = {**DEFAULTS, **hf, **ALWAYS, "moe_intermediate_size": hf.get("intermediate_size")}
        if hf.get("layer_types") is None:
            hf["layer_types"] = periodic_layer_types(layers, 2)
        if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
            hf["rope_scaling"] = YARN
        cfg = super().from_hf(hf, dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len)
        activation = ClampedSwiGLU(
            float(hf.get("swiglu_alpha", 1.702)), float(hf.get("swiglu_limit", 7.0))
        )
        packing = None if quant_method(hf) is None else MXFP4
        moe = dataclasses.replace(cfg.moe, bias=True, activation=activation, packing=packing)
        return dataclasses.replace(cfg, moe=moe)


class GptOssAttention(LlamaAttention):
    """Llama's attention; each head may also attend to nothing, as far as its sink draws it."""

    def __init__(self, cfg: SparseConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        self.sinks = param((cfg.num_attention_heads,), ("heads",), "float32")

    @property
    def sink_logits(self) -> jax.Array:
        return self.sinks[...]


class GptOssForCausalLM(LlamaForCausalLM):
    config_class = GptOssConfig

    @staticmethod
    def decoder_layer(cfg: SparseConfig, layer: int) -> LlamaDecoderLayer:
        mlp = SparseMLP(cfg.hidden_size, cfg.moe, cfg.dtype)
        return LlamaDecoderLayer(cfg, GptOssAttention(cfg, layer), mlp)

    @staticmethod
    def weight_table(cfg: SparseConfig, dialect: str) -> WeightTable:
        del dialect  # Hugging Face's only
        D, E, F = cfg.hidden_size, cfg.moe.num_experts, cfg.moe.moe_intermediate_size
        at, of = "model.layers.{i}.", "layers.{i}."
        experts, target = at + "mlp.experts.", of + "mlp.experts."
        rules = (
            *frame_rules(cfg, HF_NAMES),
            *attention_rules(cfg, HF_NAMES),
            *linear_rules(at + "mlp.router", of + "mlp.gate", E, D, bias=True),
            WeightRule(at + "self_attn.sinks", of + "self_attn.sinks", (cfg.num_attention_heads,)),
            WeightRule(
                experts + "gate_up_proj_bias",
                target + "gate_up_bias",
                (E, 2 * F),
                transform=gate_above_up,
            ),
            WeightRule(experts + "down_proj_bias", target + "down_bias", (E, D)),
            *(expert_rules if cfg.moe.packing is None else packed_expert_rules)(
                experts, target, E, D, F
            ),
        )
        return WeightTable(rules, ignored_tensors(cfg, HF_NAMES))


def expert_rules(theirs: str, ours: str, E: int, D: int, F: int) -> list[WeightRule]:
    return [
        WeightRule(
            theirs + "gate_up_proj",
            ours + "gate_up_proj",
            (E, D, 2 * F),
            transform=lambda weights: gate_above_up(weights.swapaxes(1, 2)),
            transformed=(E, 2 * F, D),
        ),
        WeightRule(
            theirs + "down_proj",
            ours + "down_proj",
            (E, F, D),
            transform=lambda weights: weights.swapaxes(1, 2),
            transformed=(E, D, F),
        ),
    ]


def packed_expert_rules(theirs: str, ours: str, E: int, D: int, F: int) -> list[WeightRule]:
    """Blocks are groups of codes that share a scale; depth is a multiple of them."""

    def in_rows(blocks: np.ndarray) -> np.ndarray:
        return blocks.reshape(*blocks.shape[:2], -1)

    rules = []
    for name, rows, depth, order in (
        ("gate_up_proj", 2 * F, D, gate_above_up),
        ("down_proj", D, F, in_rows),
    ):
        blocks = (E, rows, MXFP4.num_groups(depth), MXFP4.num_bytes(MXFP4.group))
        rules += [
            WeightRule(
                f"{theirs}{name}_blocks",
                f"{ours}{name}.codes",
                blocks,
                transform=lambda blocks, order=order: order(in_rows(blocks)),
                transformed=(E, rows, MXFP4.num_bytes(depth)),
            ),
            WeightRule(
                f"{theirs}{name}_scales", f"{ours}{name}.scales", blocks[:3], transform=order
            ),
        ]
    return rules


def gate_above_up(rows: np.ndarray) -> np.ndarray:
    """Axis 1 of checkpoints holds rows of gate and up in turn."""
    return np.concatenate([rows[:, ::2], rows[:, 1::2]], axis=1)
