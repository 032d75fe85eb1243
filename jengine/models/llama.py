"""Llama (arXiv:2302.13971, 2407.21783) and the families that differ in configuration only."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jengine.kv_spec import KVKind, KVSpec
from jengine.layers.attention import AttentionMetadata, rotary_paged_attention
from jengine.layers.gated import Activation, gated_linear
from jengine.layers.linear import Embedding, Linear, LMHead, scaled, sum_of_ranks
from jengine.layers.linear import logits as head_logits
from jengine.layers.norm import RMSNorm
from jengine.layers.rope import rope_cos_sin
from jengine.loading.rules import WeightTable
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import (
    attention_rules,
    frame_rules,
    ignored_tensors,
    mlp_rules,
    names_of,
)
from jengine.pallas_kernels.linear.reference import sum_of_parts


class LlamaConfig(DecoderConfig):
    """Llama's config.json holds the shared fields, and each means what it says."""


class LlamaAttention(nnx.Module):
    """Grouped-query attention with rotary positions; q, k and v come from one fused projection."""

    def __init__(self, cfg: DecoderConfig, layer: int) -> None:
        self.layer = layer
        self.head_dim = cfg.head_dim
        self.scale, self.soft_cap = cfg.attention_scale, cfg.attention_soft_cap
        self.spec = kv_spec(cfg, layer)
        heads_dim = cfg.num_attention_heads * cfg.head_dim
        kv_dim = cfg.num_key_value_heads * cfg.head_dim
        self.qkv_proj = Linear(
            cfg.hidden_size,
            (heads_dim, kv_dim, kv_dim),
            ("heads", "embed"),
            cfg.dtype,
            bias=cfg.attention_bias,
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
        """(out [T, D], pages)."""
        parts_PTD, kv_pages = self.parts(x_TD, kv_pages, metadata, rotation)
        return sum_of_parts(parts_PTD, x_TD.dtype), kv_pages

    def parts(
        self,
        x_TD: jax.Array,
        kv_pages: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """(summands of out [P, T, D], pages)."""
        attended_TF, kv_pages = self.attend(x_TD, kv_pages, metadata, rotation)
        return self.o_proj.parts(attended_TF, metadata.num_tokens), kv_pages

    def attend(
        self,
        x_TD: jax.Array,
        kv_pages: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """(what the heads found, side by side, pages)."""
        T = x_TD.shape[0]
        qkv_PTX = self.project(x_TD, metadata.num_tokens)
        out_TNH, kv_pages = rotary_paged_attention(
            qkv_PTX.reshape(-1, T, qkv_PTX.shape[2] // self.head_dim, self.head_dim),
            rotation,
            kv_pages,
            metadata,
            dtype=x_TD.dtype,
            layer=self.layer,
            spec=self.spec,
            scale=self.scale,
            soft_cap=self.soft_cap,
            sinks_N=self.sink_logits,
            head_norms=self.head_norms,
        )
        return out_TNH.reshape(T, -1), kv_pages

    def project(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """[P, T, X]: summands of the rows of queries, keys and values, side by side."""
        return self.qkv_proj.parts(x_TD, num_tokens)

    @property
    def head_norms(self) -> tuple[RMSNorm, RMSNorm] | None:
        """Norms of every head of q and of k, in families that have them."""
        return None

    @property
    def sink_logits(self) -> jax.Array | None:
        """float32 [N]: one logit more in each head's softmax, in families that have them."""
        return None


class LlamaMLP(nnx.Module):
    """A gated linear unit, SwiGLU in Llama; gate and up come from one fused projection."""

    def __init__(self, cfg: DecoderConfig) -> None:
        self.activation: Activation = cfg.hidden_act
        self.gate_up_proj = Linear(
            cfg.hidden_size,
            (cfg.intermediate_size, cfg.intermediate_size),
            ("mlp", "embed"),
            cfg.dtype,
            bias=cfg.mlp_bias,
        )
        self.down_proj = Linear(
            cfg.intermediate_size, cfg.hidden_size, ("embed", "mlp"), cfg.dtype, bias=cfg.mlp_bias
        )

    def __call__(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        return sum_of_parts(self.parts(x_TD, num_tokens), x_TD.dtype)

    def parts(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """[P, T, D]: summands of the result."""
        return sum_of_ranks(self.local_parts(x_TD, num_tokens), num_tokens, "mlp")

    def local_parts(self, x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """As `parts`, of what this rank adds."""
        product_TF = gated_linear(self.gate_up_proj, x_TD, self.activation, num_tokens)
        return self.down_proj.local_parts(product_TF, num_tokens)


class LlamaDecoderLayer(nnx.Module):
    """Pre-norm residual block around an attention and an MLP of any family."""

    def __init__(
        self,
        cfg: DecoderConfig,
        self_attn: nnx.Module,
        mlp: nnx.Module,
        norm_class: type[RMSNorm] = RMSNorm,
    ) -> None:
        self.input_layernorm = norm_class(cfg.hidden_size, cfg.rms_norm_eps, cfg.dtype)
        self.self_attn: Any = self_attn
        self.post_attention_layernorm = norm_class(cfg.hidden_size, cfg.rms_norm_eps, cfg.dtype)
        self.mlp: Any = mlp

    def __call__(
        self,
        x_TD: jax.Array,
        added_PTD: jax.Array | None,
        kv_pages: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """(stream, what is still to be added to it, pages); so are the arguments."""
        n = metadata.num_tokens
        x_TD, normed_TD = self.input_layernorm.after(x_TD, added_PTD, n)
        added_PTD, kv_pages = self.self_attn.parts(normed_TD, kv_pages, metadata, rotation)
        x_TD, normed_TD = self.post_attention_layernorm.after(x_TD, added_PTD, n)
        return x_TD, self.mlp.parts(normed_TD, n), kv_pages


class LlamaForCausalLM(nnx.Module):
    """Decoder-only language model. `__call__` maps packed tokens to final hidden states; `head`
    gives logits.
    """

    config_class: type[DecoderConfig] = LlamaConfig
    norm_class: type[RMSNorm] = RMSNorm  # the last norm's

    def __init__(self, cfg: DecoderConfig) -> None:
        self.cfg = cfg
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, cfg.dtype)
        self.layers = nnx.List(
            [self.decoder_layer(cfg, layer) for layer in range(cfg.num_hidden_layers)]
        )
        self.norm = self.norm_class(cfg.hidden_size, cfg.rms_norm_eps, cfg.dtype)
        self.lm_head = (
            None if cfg.tie_word_embeddings else LMHead(cfg.vocab_size, cfg.hidden_size, cfg.dtype)
        )

    def __call__(
        self, token_ids_T: jax.Array, kv: Sequence[jax.Array], metadata: AttentionMetadata
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns (hidden [T, D] after the last norm, kv). `kv` holds one page array per layer and
        is consumed.
        """
        ropes = [self.cfg.layer_rope(layer) for layer in range(len(self.layers))]
        rotations = {r: rope_cos_sin(r, metadata.positions) for r in dict.fromkeys(ropes)}
        # Where a layer ends with a sum, the next one's norm forms it: one kernel.
        x_TD, added_PTD = self.embed(token_ids_T), None
        new_kv = []
        for layer, rope, kv_pages in zip(self.layers, ropes, kv, strict=True):
            x_TD, added_PTD, kv_pages = layer(x_TD, added_PTD, kv_pages, metadata, rotations[rope])
            new_kv.append(kv_pages)
        _, hidden_TD = self.norm.after(x_TD, added_PTD, metadata.num_tokens)
        return hidden_TD, tuple(new_kv)

    def embed(self, token_ids_T: jax.Array) -> jax.Array:
        x_TD, scale = self.embed_tokens(token_ids_T), self.cfg.embedding_scale
        return x_TD if scale == 1.0 else scaled(x_TD, scale)

    def logits(self, hidden_SD: jax.Array, num_seqs: jax.Array) -> jax.Array:
        """float32 [S, V] of rows that `__call__` gave."""
        return self.scale_logits(head_logits(hidden_SD, self.head, num_seqs))

    def scale_logits(self, logits_SV: jax.Array) -> jax.Array:
        """What a family does to the product with the head."""
        cfg = self.cfg
        if cfg.logit_scale != 1.0:
            logits_SV = logits_SV * cfg.logit_scale
        if cfg.logit_soft_cap is not None:
            logits_SV = cfg.logit_soft_cap * jnp.tanh(logits_SV / cfg.logit_soft_cap)
        return logits_SV

    @property
    def head(self) -> jax.Array:
        """Output embedding [V, D]."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    @staticmethod
    def decoder_layer(cfg: Any, layer: int) -> nnx.Module:
        """The parts that a family puts into each layer. `cfg` is of its `config_class`."""
        return LlamaDecoderLayer(cfg, LlamaAttention(cfg, layer), LlamaMLP(cfg))

    @staticmethod
    def kv_specs(cfg: DecoderConfig) -> tuple[KVSpec, ...]:
        return tuple(kv_spec(cfg, layer) for layer in range(cfg.num_hidden_layers))

    @staticmethod
    def weight_table(cfg: Any, dialect: str) -> WeightTable:
        names = names_of(dialect)
        rules = (
            *frame_rules(cfg, names),
            *attention_rules(cfg, names, rotary_pairs=dialect == "gguf"),
            *mlp_rules(cfg, names),
        )
        return WeightTable(rules, ignored_tensors(cfg, names))


def kv_spec(cfg: DecoderConfig, layer: int) -> KVSpec:
    window = cfg.layer_windows[layer]
    return KVSpec(
        KVKind.FULL if window is None else KVKind.SLIDING_WINDOW,
        (2, cfg.num_key_value_heads, cfg.head_dim),
        cfg.kv_dtype,
        np.dtype(jax.numpy.dtype(cfg.kv_dtype)).itemsize,
        window,
    )
