"""How the published checkpoints name what fills which parameter."""

from collections.abc import Callable

import numpy as np

from jengine.errors import LoadError
from jengine.loading.rules import WeightRule
from jengine.models.decoder_weights import linear_rules, packed_rules, weight_rule
from jengine.models.deepseek_v4.compressor import num_halves
from jengine.models.deepseek_v4.config import Compression, DeepseekV4Config

DRAFTS = "mtp"  # what names of draft blocks start with


def weight_rules(cfg: DeepseekV4Config) -> tuple[WeightRule, ...]:
    """All but the draft blocks."""
    V, D = cfg.vocab_size, cfg.hidden_size
    compressors = [
        rule
        for layer, compression in enumerate(cfg.compressions)
        if compression is not None
        for rule in attention_compressor_rules(cfg, f"layers.{layer}.attn.", compression)
    ]
    return (
        weight_rule("embed", "embed_tokens", V, D),
        weight_rule("head", "lm_head", V, D),
        weight_rule("norm", "norm", D),
        *head_rules(cfg, "", ""),
        *layer_rules(cfg, "layers.{i}."),
        *compressors,
    )


def head_rules(cfg: DeepseekV4Config, theirs: str, ours: str) -> list[WeightRule]:
    """Of the hyper-connection before a head."""
    c = cfg.hyper.num_streams
    shapes = {"fn": (c, c * cfg.hidden_size), "base": (c,), "scale": (1,)}
    return [
        WeightRule(f"{theirs}hc_head_{part}", f"{ours}hc_head.{part}", shape)
        for part, shape in shapes.items()
    ]


def layer_rules(cfg: DeepseekV4Config, theirs: str, ours: str | None = None) -> list[WeightRule]:
    """Of what every layer has, and a draft block too."""
    ours = theirs if ours is None else ours
    D, c = cfg.hidden_size, cfg.hyper.num_streams
    rows = 2 * c + c * c
    shapes = {"fn": (rows, c * D), "base": (rows,), "scale": (3,)}
    return [
        *(
            WeightRule(f"{theirs}hc_{block}_{part}", f"{ours}{block}_hc.{part}", shape)
            for block in ("attn", "ffn")
            for part, shape in shapes.items()
        ),
        weight_rule(theirs + "attn_norm", ours + "attn_norm", D),
        weight_rule(theirs + "ffn_norm", ours + "ffn_norm", D),
        *attention_rules(cfg, theirs + "attn.", ours + "attn."),
        *expert_rules(cfg, theirs + "ffn.", ours + "ffn."),
    ]


def attention_rules(cfg: DeepseekV4Config, theirs: str, ours: str) -> list[WeightRule]:
    D, N, H = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim
    rank, groups = cfg.q_lora_rank, cfg.o_groups
    shapes = {
        "wq_a": (rank, D),
        "wq_b": (N * H, rank),
        "wkv": (H, D),
        "wo_a": (groups * cfg.o_lora_rank, N * H // groups),
        "wo_b": (D, groups * cfg.o_lora_rank),
    }
    return [
        *(
            rule
            for name, (rows, depth) in shapes.items()
            for rule in linear_rules(
                theirs + name, ours + name, rows, depth, bias=False, packing=cfg.packing
            )
        ),
        weight_rule(theirs + "q_norm", ours + "q_norm", rank),
        weight_rule(theirs + "kv_norm", ours + "kv_norm", H),
        WeightRule(theirs + "attn_sink", ours + "attn_sink", (N,)),
    ]


def attention_compressor_rules(
    cfg: DeepseekV4Config, prefix: str, compression: Compression
) -> list[WeightRule]:
    """Of one layer: shapes depend on how it compresses."""
    rules = compressor_rules(cfg, prefix + "compressor.", cfg.head_dim, compression)
    if not compression.is_sparse:
        return rules
    index, indexer = cfg.index, prefix + "indexer."
    wq_b, weights = indexer + "wq_b", indexer + "weights_proj"
    rows, rank = index.num_heads * index.head_dim, cfg.q_lora_rank
    return [
        *rules,
        *linear_rules(wq_b, wq_b, rows, rank, bias=False, packing=cfg.packing),
        *linear_rules(weights, weights, index.num_heads, cfg.hidden_size, bias=False),
        *compressor_rules(cfg, indexer + "compressor.", index.head_dim, compression),
    ]


def compressor_rules(
    cfg: DeepseekV4Config, prefix: str, channels: int, compression: Compression
) -> list[WeightRule]:
    width = num_halves(compression) * channels
    return [
        weight_rule(prefix + "wkv", prefix + "wkv", width, cfg.hidden_size),
        weight_rule(prefix + "wgate", prefix + "wgate", width, cfg.hidden_size),
        weight_rule(prefix + "norm", prefix + "norm", channels),
        WeightRule(prefix + "ape", prefix + "ape", (compression.ratio, width)),
    ]


def expert_rules(cfg: DeepseekV4Config, theirs: str, ours: str) -> list[WeightRule]:
    """w1 is the gate, w3 up, w2 down."""
    D, E, F = cfg.hidden_size, cfg.moe.num_experts, cfg.moe.moe_intermediate_size
    shared, S = "shared_experts", cfg.shared_intermediate_size
    routed = theirs + "experts.{e}."
    gate_up, down = ours + "experts.gate_up_proj", ours + "experts.down_proj"
    shared_gate_up = f"{ours}{shared}.gate_up_proj"
    packing = cfg.packing
    of_routed = [
        WeightRule(routed + "w1.weight", gate_up, (F, D)),
        WeightRule(routed + "w3.weight", gate_up, (F, D), offset=F),
        WeightRule(routed + "w2.weight", down, (D, F)),
    ]
    return [
        weight_rule(theirs + "gate", ours + "gate", E, D),
        WeightRule(theirs + "gate.bias", ours + "e_score_correction_bias", (E,)),
        WeightRule(
            theirs + "gate.tid2eid",
            ours + "tid2eid",
            (cfg.vocab_size, cfg.moe.num_experts_per_tok),
            transform=checked_table(E),
        ),
        *(part for rule in of_routed for part in packed_rules(rule, cfg.moe.packing)),
        *linear_rules(f"{theirs}{shared}.w1", shared_gate_up, S, D, bias=False, packing=packing),
        *linear_rules(
            f"{theirs}{shared}.w3", shared_gate_up, S, D, bias=False, packing=packing, offset=S
        ),
        *linear_rules(
            f"{theirs}{shared}.w2", f"{ours}{shared}.down_proj", D, S, bias=False, packing=packing
        ),
    ]


def checked_table(num_experts: int) -> Callable[[np.ndarray], np.ndarray]:
    """For the table of experts by token: a wrong id would read another's weights."""

    def check(table: np.ndarray) -> np.ndarray:
        in_order = np.sort(table, axis=1)
        if in_order[:, 0].min() < 0 or in_order[:, -1].max() >= num_experts:
            raise LoadError(f"a table of experts by token has ids outside of 0..{num_experts - 1}")
        if (in_order[:, 1:] == in_order[:, :-1]).any():
            raise LoadError("a table of experts by token names an expert twice for one token")
        return table

    return check
