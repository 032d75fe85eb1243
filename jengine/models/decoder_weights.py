"""How checkpoints name the parts that decoder families share, and the rules for each part."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jengine.loading.rules import WeightRule

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TensorNames:
    """One dialect's names, without ".weight" or ".bias". `{i}` stands for the layer."""

    embed: str
    norm: str
    head: str
    input_norm: str
    post_attention_norm: str
    q: str
    k: str
    v: str
    o: str
    q_norm: str
    k_norm: str
    gate: str
    up: str
    down: str
    ignored: tuple[str, ...]


HF_NAMES = TensorNames(
    embed="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    input_norm="model.layers.{i}.input_layernorm",
    post_attention_norm="model.layers.{i}.post_attention_layernorm",
    q="model.layers.{i}.self_attn.q_proj",
    k="model.layers.{i}.self_attn.k_proj",
    v="model.layers.{i}.self_attn.v_proj",
    o="model.layers.{i}.self_attn.o_proj",
    q_norm="model.layers.{i}.self_attn.q_norm",
    k_norm="model.layers.{i}.self_attn.k_norm",
    gate="model.layers.{i}.mlp.gate_proj",
    up="model.layers.{i}.mlp.up_proj",
    down="model.layers.{i}.mlp.down_proj",
    ignored=("*.rotary_emb.inv_freq",),
)
GGUF_NAMES = TensorNames(
    embed="token_embd",
    norm="output_norm",
    head="output",
    input_norm="blk.{i}.attn_norm",
    post_attention_norm="blk.{i}.ffn_norm",
    q="blk.{i}.attn_q",
    k="blk.{i}.attn_k",
    v="blk.{i}.attn_v",
    o="blk.{i}.attn_output",
    q_norm="blk.{i}.attn_q_norm",
    k_norm="blk.{i}.attn_k_norm",
    gate="blk.{i}.ffn_gate",
    up="blk.{i}.ffn_up",
    down="blk.{i}.ffn_down",
    ignored=("rope_freqs.weight",),
)


def names_of(dialect: str) -> TensorNames:
    return GGUF_NAMES if dialect == "gguf" else HF_NAMES


def weight_rule(source: str, target: str, *shape: int) -> WeightRule:
    """The rule of a tensor that fills a whole parameter, such as a norm's."""
    return WeightRule(source + ".weight", target + ".weight", shape)


def linear_rules(
    source: str,
    target: str,
    rows: int,
    columns: int,
    *,
    bias: bool,
    offset: int = 0,
    transform: Transform | None = None,
) -> list[WeightRule]:
    """The rules of one projection, which fills `rows` of a (fused) one from `offset` on."""
    rules = [WeightRule(source + ".weight", target + ".weight", (rows, columns), offset, transform)]
    if bias:
        rules.append(WeightRule(source + ".bias", target + ".bias", (rows,), offset, transform))
    return rules


def undo_rotary_pairs(heads: int, head_dim: int) -> Transform:
    """For q and k rows as llama.cpp's `llama` architecture stores them: each rotary pair side by
    side.
    """

    def transform(rows: np.ndarray) -> np.ndarray:
        paired = rows.reshape(heads, head_dim // 2, 2, *rows.shape[1:])
        return paired.swapaxes(1, 2).reshape(rows.shape)

    return transform
