"""Attention of DeepSeek-V4: over a window of single tokens and, in most layers, over
compressed entries too, in one softmax. A token's or an entry's one vector is the key and the value
of all heads.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.linear import Linear
from jengine.layers.norm import WideRMSNorm
from jengine.layers.param import param
from jengine.models.deepseek_v4.caches import LayerCaches
from jengine.models.deepseek_v4.compressor import Compressor
from jengine.models.deepseek_v4.config import Compression, DeepseekV4Config
from jengine.models.deepseek_v4.indexer import Indexer
from jengine.models.deepseek_v4.rotary import Rotation, inverse, rotate_tail
from jengine.models.deepseek_v4.step_context import EntryContext, StepContext
from jengine.pallas_kernels.compress_tokens import compress_tokens
from jengine.pallas_kernels.joint_attention import joint_attention
from jengine.pallas_kernels.latent_write.api import latent_write
from jengine.pallas_kernels.linear_heads.api import linear_heads
from jengine.pallas_kernels.norm_and_rotate.api import norm_and_rotate
from jengine.pallas_kernels.packed import split_rows


class CompressedAttention(nnx.Module):
    """Names are DeepSeek's."""

    def __init__(
        self, cfg: DeepseekV4Config, compression: Compression | None, caches: LayerCaches
    ) -> None:
        D, N, H, G = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim, cfg.o_groups
        rank, dtype, eps = cfg.q_lora_rank, cfg.dtype, cfg.rms_norm_eps
        packing = cfg.packing
        self.num_heads, self.head_dim, self.num_groups = N, H, G
        self.scale, self.norm_eps = cfg.attention_scale, eps
        self.compression, self.caches = compression, caches
        self.wq_a = Linear(D, rank, (None, "embed"), dtype, packing=packing)
        self.q_norm = WideRMSNorm(rank, eps, dtype)
        self.wq_b = Linear(rank, N * H, ("heads", None), dtype, packing=packing)
        self.wkv = Linear(D, H, (None, "embed"), dtype, packing=packing)
        self.kv_norm = WideRMSNorm(H, eps, dtype, axis="head_dim")
        self.attn_sink = param((N,), ("heads",), "float32", init="zeros")
        # A group of heads is projected by its own rows, from its own values.
        rows, axes = G * cfg.o_lora_rank, ("heads", None)
        self.wo_a = Linear(N * H // G, rows, axes, dtype, packing=packing)
        self.wo_b = Linear(rows, D, ("embed", "heads"), dtype, packing=packing)
        self.compressor = None if compression is None else Compressor(D, H, compression, eps, dtype)
        sparse = compression if compression is not None and compression.is_sparse else None
        self.indexer = (
            None
            if sparse is None
            else Indexer(D, rank, cfg.index, sparse, eps, dtype, packing=packing)
        )

    def __call__(self, x_TD: jax.Array, kv: list[jax.Array], context: StepContext) -> jax.Array:
        """Out [T, D]. Replaces its arrays in `kv`, which are consumed."""
        metadata, num_tokens = context.metadata, context.metadata.num_tokens
        rotation = self.rotation(context)
        latent_TR = self.q_norm(self.wq_a(x_TD, num_tokens), num_tokens)
        window = self.caches.window
        kv[window] = latent_write(
            kv[window],
            self.vectors(x_TD, rotation, num_tokens),
            metadata.slots[context.group(window)],
            num_tokens,
        )
        read = [(kv[window], context.window_slots_TW)]
        if self.compressor is not None and self.compression is not None:
            entries = context.entries[self.compression]
            self.compress(self.compressor, x_TD, kv, entries, context)
            slots_Tk = entries.all_slots_Tk
            if self.indexer is not None:
                pages_PBE, group = kv[self.caches.entries], context.group(self.caches.entries)
                slots_Tk = self.indexer.select(
                    x_TD, latent_TR, pages_PBE, metadata, rotation, group
                )
            assert slots_Tk is not None  # a layer without an indexer reads all entries
            read.append((kv[self.caches.entries], slots_Tk))
        out_TNH = joint_attention(
            self.queries(latent_TR, rotation, num_tokens),
            read,
            self.attn_sink[...],
            num_tokens,
            scale=self.scale,
        )
        return self.output(out_TNH, rotation, num_tokens)

    def rotation(self, context: StepContext) -> Rotation:
        """All that rotates in a layer that compresses rotates slowly."""
        is_plain = self.compression is None
        return context.window_rotation if is_plain else context.compress_rotation

    def queries(self, latent_TR: jax.Array, rotation: Rotation, num_tokens: jax.Array) -> jax.Array:
        """[T, N, H]: every head of length sqrt(H), then rotated."""
        q_TX = self.wq_b(latent_TR, num_tokens)
        q_TNH = q_TX.reshape(-1, self.num_heads, self.head_dim)
        return norm_and_rotate(q_TNH, *rotation, num_tokens, eps=self.norm_eps)

    def vectors(self, x_TD: jax.Array, rotation: Rotation, num_tokens: jax.Array) -> jax.Array:
        """[T, H]: what the window keeps of each token."""
        kv_TH = self.kv_norm(self.wkv(x_TD, num_tokens), num_tokens)
        return rotate_tail(kv_TH[:, None], rotation)[:, 0]

    def compress(
        self,
        compressor: Compressor,
        x_TD: jax.Array,
        kv: list[jax.Array],
        entries: EntryContext,
        context: StepContext,
    ) -> None:
        """Write the entries that the step completes; leave the others in the state. An index key
        is compressed as its entry is, beside it."""
        metadata, caches = context.metadata, self.caches
        parts = [compressor] if self.indexer is None else [compressor, self.indexer.compressor]
        projected = [p.project(x_TD, metadata.positions, metadata.num_tokens) for p in parts]
        values_TUH, scores_TUH = (
            jnp.concatenate(list(x), axis=-1) for x in zip(*projected, strict=True)
        )
        raw_GE, kv[caches.state] = compress_tokens(
            values_TUH,
            scores_TUH,
            kv[caches.state],
            metadata.slots[context.group(caches.state)],
            entries.pieces,
            is_decode=metadata.is_decode,
        )
        ends = [sum(p.channels for p in parts[: i + 1]) for i in range(len(parts) - 1)]
        finished = [
            part.finish(raw, entries.pieces, entries.rotation)
            for part, raw in zip(parts, jnp.split(raw_GE, ends, axis=1), strict=True)
        ]
        kv[caches.entries] = latent_write(
            kv[caches.entries],
            jnp.concatenate(finished, axis=-1),
            entries.slots_G,
            jnp.int32(entries.slots_G.shape[0]),
        )

    def output(self, out_TNH: jax.Array, rotation: Rotation, num_tokens: jax.Array) -> jax.Array:
        """[T, D]. Values are rotated by their own positions; rotated back by the query's, what
        heads found depends on distances only."""
        T, G = out_TNH.shape[0], self.num_groups
        grouped_TGX = rotate_tail(out_TNH, inverse(rotation)).reshape(T, G, -1)
        wo_a_GRX = split_rows(self.wo_a.weight[...], G)
        rows_TGR = linear_heads(grouped_TGX, wo_a_GRX, num_tokens=num_tokens)
        return self.wo_b(rows_TGR.reshape(T, -1), num_tokens)
