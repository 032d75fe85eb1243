"""Llama (arXiv:2302.13971, 2407.21783) and the families that differ in configuration only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np
from flax import nnx

from jengine.kv_spec import KVKind, KVSpec
from jengine.layers.attention import AttentionMetadata, rotary_paged_attention
from jengine.layers.linear import Embedding, Linear, LMHead
from jengine.layers.norm import RMSNorm
from jengine.layers.rope import RopeTable, build_rope, rope_cos_sin
from jengine.loading.rules import WeightRule, WeightTable
from jengine.models.config_fields import ConfigFields
from jengine.models.decoder_weights import (
    TensorNames,
    linear_rules,
    names_of,
    undo_rotary_pairs,
    weight_rule,
)
from jengine.pallas_kernels.silu_mul.api import silu_mul


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of one model. Field names are Hugging Face's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    layer_windows: tuple[int | None, ...]
    rope: RopeTable
    dtype: str
    kv_dtype: str

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        """Read a config.json. Raises `LoadError` naming a missing or unsupported field."""
        fields = ConfigFields(hf)
        heads = fields.integer("num_attention_heads")
        hidden = fields.integer("hidden_size")
        layers = fields.integer("num_hidden_layers")
        head_dim = fields.integer("head_dim", default=hidden // heads)
        max_position = fields.integer("max_position_embeddings", default=2048)
        theta, scaling = fields.rope()
        fields.require("hidden_act", ("silu",), default="silu")
        attention_bias = bool(hf.get("attention_bias", False))
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=fields.integer("num_key_value_heads", default=heads),
            head_dim=head_dim,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=max_position,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=attention_bias,
            attention_out_bias=attention_bias,
            mlp_bias=bool(hf.get("mlp_bias", False)),
            layer_windows=fields.layer_windows(layers),
            rope=build_rope(head_dim, theta, scaling, max_position, max_model_len),
            dtype=dtype,
            kv_dtype=kv_dtype,
        )


class LlamaAttention(nnx.Module):
    """Grouped-query attention with rotary positions; q, k and v come from one fused projection."""

    def __init__(self, cfg: LlamaConfig, layer: int) -> None:
        self.layer = layer
        self.head_dim = cfg.head_dim
        self.spec = kv_spec(cfg, layer)
        heads_dim = cfg.num_attention_heads * cfg.head_dim
        rows = heads_dim + 2 * cfg.num_key_value_heads * cfg.head_dim
        self.qkv_proj = Linear(
            cfg.hidden_size, rows, ("heads", "embed"), cfg.dtype, bias=cfg.attention_bias
        )
        self.o_proj = Linear(
            heads_dim,
            cfg.hidden_size,
            ("embed", "heads"),
            cfg.dtype,
            bias=cfg.attention_out_bias,
        )

    def __call__(
        self,
        x_TD: jax.Array,
        kv_pages: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        T, H = x_TD.shape[0], self.head_dim
        out_TNH, kv_pages = rotary_paged_attention(
            self.qkv_proj(x_TD, metadata.num_tokens).reshape(T, -1, H),
            rotation,
            kv_pages,
            metadata,
            layer=self.layer,
            spec=self.spec,
            scale=H**-0.5,
            head_norms=self.head_norms,
        )
        return self.o_proj(out_TNH.reshape(T, -1), metadata.num_tokens), kv_pages

    @property
    def head_norms(self) -> tuple[RMSNorm, RMSNorm] | None:
        """Norms of every head of q and of k, in families that have them."""
        return None


class LlamaMLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202); gate and up come from one fused projection."""

    def __init__(self, cfg: LlamaConfig) -> None:
        self.gate_up_proj = Linear(
            cfg.hidden_size,
            2 * cfg.intermediate_size,
            ("mlp", "embed"),
            cfg.dtype,
            bias=cfg.mlp_bias,
        )
        self.down_proj = Linear(
            cfg.intermediate_size, cfg.hidden_size, ("embed", "mlp"), cfg.dtype, bias=cfg.mlp_bias
        )

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        gate_up_TF = self.gate_up_proj(x_TD, num_tokens)
        return self.down_proj(silu_mul(gate_up_TF, num_tokens=num_tokens), num_tokens)


class LlamaDecoderLayer(nnx.Module):
    """Pre-norm residual block around an attention and an MLP of any family."""

    def __init__(self, cfg: LlamaConfig, self_attn: nnx.Module, mlp: nnx.Module) -> None:
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, cfg.dtype)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, cfg.dtype)
        self.mlp = mlp

    def __call__(
        self,
        x_TD: jax.Array,
        kv_pages: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        attended_TD, kv_pages = self.self_attn(
            self.input_layernorm(x_TD, metadata.num_tokens), kv_pages, metadata, rotation
        )
        x_TD = x_TD + attended_TD
        normed_TD = self.post_attention_layernorm(x_TD, metadata.num_tokens)
        return x_TD + self.mlp(normed_TD, metadata.num_tokens), kv_pages


class LlamaForCausalLM(nnx.Module):
    """Decoder-only language model. `__call__` maps packed tokens to final hidden states; `head`
    gives logits.
    """

    config_class = LlamaConfig

    def __init__(self, cfg: LlamaConfig) -> None:
        self.cfg = cfg
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, cfg.dtype)
        self.layers = nnx.List(
            [self.decoder_layer(cfg, layer) for layer in range(cfg.num_hidden_layers)]
        )
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, cfg.dtype)
        self.lm_head = (
            None if cfg.tie_word_embeddings else LMHead(cfg.vocab_size, cfg.hidden_size, cfg.dtype)
        )

    def __call__(
        self, token_ids_T: jax.Array, kv: Sequence[jax.Array], metadata: AttentionMetadata
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns (hidden [T, D] after the last norm, kv). `kv` holds one page array per layer and
        is consumed.
        """
        rotation = rope_cos_sin(self.cfg.rope, metadata.positions)
        x_TD = self.embed_tokens(token_ids_T)
        new_kv = []
        for layer, kv_pages in zip(self.layers, kv, strict=True):
            x_TD, kv_pages = layer(x_TD, kv_pages, metadata, rotation)
            new_kv.append(kv_pages)
        return self.norm(x_TD, metadata.num_tokens), tuple(new_kv)

    @property
    def head(self) -> jax.Array:
        """Output embedding [V, D]."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    @staticmethod
    def decoder_layer(cfg: LlamaConfig, layer: int) -> LlamaDecoderLayer:
        """The parts that a family puts into each layer."""
        return LlamaDecoderLayer(cfg, LlamaAttention(cfg, layer), LlamaMLP(cfg))

    @staticmethod
    def kv_specs(cfg: LlamaConfig) -> tuple[KVSpec, ...]:
        return tuple(kv_spec(cfg, layer) for layer in range(cfg.num_hidden_layers))

    @staticmethod
    def weight_table(cfg: LlamaConfig, dialect: str) -> WeightTable:
        names = names_of(dialect)
        rules = (
            *frame_rules(cfg, names),
            *attention_rules(cfg, names, rotary_pairs=dialect == "gguf"),
            *mlp_rules(cfg, names),
        )
        return WeightTable(rules, ignored_tensors(cfg, names))


def kv_spec(cfg: LlamaConfig, layer: int) -> KVSpec:
    window = cfg.layer_windows[layer]
    return KVSpec(
        KVKind.FULL if window is None else KVKind.SLIDING_WINDOW,
        (2, cfg.num_key_value_heads, cfg.head_dim),
        cfg.kv_dtype,
        np.dtype(jax.numpy.dtype(cfg.kv_dtype)).itemsize,
        window,
    )


def frame_rules(cfg: LlamaConfig, names: TensorNames) -> list[WeightRule]:
    """What surrounds attention and MLP: embedding, norms, head."""
    V, D = cfg.vocab_size, cfg.hidden_size
    rules = [
        weight_rule(names.embed, "embed_tokens", V, D),
        weight_rule(names.norm, "norm", D),
        weight_rule(names.input_norm, "layers.{i}.input_layernorm", D),
        weight_rule(names.post_attention_norm, "layers.{i}.post_attention_layernorm", D),
    ]
    if not cfg.tie_word_embeddings:
        rules.append(weight_rule(names.head, "lm_head", V, D))
    return rules


def ignored_tensors(cfg: LlamaConfig, names: TensorNames) -> tuple[str, ...]:
    """Some files repeat the tied matrix."""
    return (*names.ignored, names.head + ".weight") if cfg.tie_word_embeddings else names.ignored


def attention_rules(
    cfg: LlamaConfig, names: TensorNames, *, rotary_pairs: bool = False
) -> list[WeightRule]:
    """`rotary_pairs`: the checkpoint keeps the two rows that rotate together side by side."""
    D, H, bias = cfg.hidden_size, cfg.head_dim, cfg.attention_bias
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    undo_q, undo_k = (undo_rotary_pairs(n, H) if rotary_pairs else None for n in (N, K))
    qkv, o = "layers.{i}.self_attn.qkv_proj", "layers.{i}.self_attn.o_proj"
    return [
        *linear_rules(names.q, qkv, N * H, D, bias=bias, transform=undo_q),
        *linear_rules(names.k, qkv, K * H, D, bias=bias, offset=N * H, transform=undo_k),
        *linear_rules(names.v, qkv, K * H, D, bias=bias, offset=(N + K) * H),
        *linear_rules(names.o, o, D, N * H, bias=cfg.attention_out_bias),
    ]


def mlp_rules(cfg: LlamaConfig, names: TensorNames) -> list[WeightRule]:
    D, F, bias = cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias
    gate_up, down = "layers.{i}.mlp.gate_up_proj", "layers.{i}.mlp.down_proj"
    return [
        *linear_rules(names.gate, gate_up, F, D, bias=bias),
        *linear_rules(names.up, gate_up, F, D, bias=bias, offset=F),
        *linear_rules(names.down, down, D, F, bias=bias),
    ]
