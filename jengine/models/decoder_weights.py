"""How checkpoints name the parts that decoder families share, and the rules for each part."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jengine.loading.block_scales import SCALE, WEIGHT
from jengine.loading.rules import WeightRule
from jengine.models.decoder_config import DecoderConfig
from jengine.pallas_kernels.packed import Packing

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TensorNames:
    """One dialect's names, without ".weight" or ".bias". `{i}` stands for the layer."""

    layer: str  # what names of a layer's tensors start with
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
    layer="model.layers.{i}.",
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
    layer="blk.{i}.",
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
    ignored=("rope_freqs.weight", "rope_factors_*.weight"),
)


def names_of(dialect: str) -> TensorNames:
    return GGUF_NAMES if dialect == "gguf" else HF_NAMES


def weight_rule(
    source: str, target: str, *shape: int, transform: Transform | None = None
) -> WeightRule:
    """The rule of a tensor that fills a whole parameter, such as a norm's."""
    return WeightRule(source + ".weight", target + ".weight", shape, transform=transform)


def linear_rules(
    source: str,
    target: str,
    rows: int,
    columns: int,
    *,
    bias: bool,
    offset: int = 0,
    transform: Transform | None = None,
    packing: Packing | None = None,
) -> list[WeightRule]:
    """The rules of one projection, which fills `rows` of a (fused) one from `offset` on."""
    weight = WeightRule(source + ".weight", target + ".weight", (rows, columns), offset, transform)
    rules = packed_rules(weight, packing)
    if bias:
        rules.append(WeightRule(source + ".bias", target + ".bias", (rows,), offset, transform))
    return rules


def packed_rules(rule: WeightRule, packing: Packing | None) -> list[WeightRule]:
    """The rule of a weight, or where it is packed those of its codes and scales, as `PackedSource`
    names them. A transform must be one of rows."""
    if packing is None:
        return [rule]
    (rows, depth), source = rule.shape, rule.source.removesuffix(WEIGHT)
    return [
        dataclasses.replace(rule, target=rule.target + part, source=source + suffix, shape=shape)
        for part, suffix, shape in (
            (".codes", WEIGHT, (rows, packing.num_bytes(depth))),
            (".scales", SCALE, (rows, packing.num_groups(depth))),
        )
    ]


def frame_rules(cfg: DecoderConfig, names: TensorNames) -> list[WeightRule]:
    """What surrounds attention and MLP: embedding, norms, head."""
    D = cfg.hidden_size
    return [
        *embedding_rules(cfg, names),
        weight_rule(names.norm, "norm", D),
        weight_rule(names.input_norm, "layers.{i}.input_layernorm", D),
        weight_rule(names.post_attention_norm, "layers.{i}.post_attention_layernorm", D),
    ]


def embedding_rules(cfg: DecoderConfig, names: TensorNames) -> list[WeightRule]:
    """Embedding, and the head where it is not tied."""
    V, D = cfg.vocab_size, cfg.hidden_size
    rules = [weight_rule(names.embed, "embed_tokens", V, D)]
    if not cfg.tie_word_embeddings:
        rules.append(weight_rule(names.head, "lm_head", V, D))
    return rules


def ignored_tensors(cfg: DecoderConfig, names: TensorNames) -> tuple[str, ...]:
    """Some files repeat the tied matrix."""
    return (*names.ignored, names.head + ".weight") if cfg.tie_word_embeddings else names.ignored


def attention_rules(
    cfg: DecoderConfig, names: TensorNames, *, rotary_pairs: bool = False
) -> list[WeightRule]:
    """`rotary_pairs`: the checkpoint keeps the two rows that rotate together side by side."""
    D, H, bias = cfg.hidden_size, cfg.head_dim, cfg.attention_bias
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    R = 2 * len(cfg.rope.inv_freq)
    undo_q, undo_k = (undo_rotary_pairs(n, H, R) if rotary_pairs else None for n in (N, K))
    qkv, o = "layers.{i}.self_attn.qkv_proj", "layers.{i}.self_attn.o_proj"
    return [
        *linear_rules(names.q, qkv, N * H, D, bias=bias, transform=undo_q),
        *linear_rules(names.k, qkv, K * H, D, bias=bias, offset=N * H, transform=undo_k),
        *linear_rules(names.v, qkv, K * H, D, bias=bias, offset=(N + K) * H),
        *linear_rules(names.o, o, D, N * H, bias=cfg.attention_out_bias),
    ]


def mlp_rules(cfg: DecoderConfig, names: TensorNames) -> list[WeightRule]:
    D, F, bias = cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias
    gate_up, down = "layers.{i}.mlp.gate_up_proj", "layers.{i}.mlp.down_proj"
    return [
        *linear_rules(names.gate, gate_up, F, D, bias=bias),
        *linear_rules(names.up, gate_up, F, D, bias=bias, offset=F),
        *linear_rules(names.down, down, D, F, bias=bias),
    ]


def undo_rotary_pairs(heads: int, head_dim: int, rotary_dim: int, first: int = 0) -> Transform:
    """For q and k rows whose rotary pairs lie side by side: the first half of the pairs first, as
    they rotate here. Rows of a head outside `first:first + rotary_dim` do not rotate and stay.
    """
    order = np.arange(head_dim)
    rotary = slice(first, first + rotary_dim)
    order[rotary] = order[rotary].reshape(-1, 2).T.reshape(-1)

    def transform(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(heads, head_dim, *rows.shape[1:])[:, order].reshape(rows.shape)

    return transform
