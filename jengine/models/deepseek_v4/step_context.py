"""What all layers of a step share: rotations, where the step cuts groups of tokens, and which slots
of a cache a query reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jengine.layers.attention import AttentionMetadata
from jengine.layers.rope import rope_cos_sin
from jengine.models.deepseek_v4.caches import layer_caches
from jengine.models.deepseek_v4.config import Compression, DeepseekV4Config
from jengine.models.deepseek_v4.rotary import Rotation
from jengine.pallas_kernels.compress_tokens import Pieces, cut_into_pieces


@dataclass(frozen=True)
class EntryContext:
    """Of the layers with one ratio."""

    pieces: Pieces
    rotation: Rotation  # of the entries of these pieces
    slots_G: jax.Array  # where they go; -1 while their group is not complete
    all_slots_Tk: jax.Array | None  # of every entry that a query sees, where it reads them all


@dataclass(frozen=True)
class StepContext:
    """Arrays live as long as the step is traced."""

    metadata: AttentionMetadata
    window_rotation: Rotation  # of layers with a window only
    compress_rotation: Rotation  # of the others
    window_slots_TW: jax.Array
    entries: dict[Compression, EntryContext]

    def group(self, cache: int) -> int:
        return self.metadata.group_of_layer[cache]


def build_context(
    cfg: DeepseekV4Config, kv: Sequence[jax.Array], metadata: AttentionMetadata
) -> StepContext:
    """`kv` is looked at for its shapes only."""
    T, caches = metadata.positions.shape[0], layer_caches(cfg)
    cache_of = {
        compression: caches[layer]
        for layer, compression in enumerate(cfg.compressions)
        if compression is not None
    }
    entries = {}
    for compression, cache in cache_of.items():
        pieces = cut_into_pieces(
            metadata.cu_q_lens,
            metadata.kv_lens,
            T,
            compression.ratio,
            is_decode=metadata.is_decode,
        )
        group = metadata.group_of_layer[cache.entries]
        slots_G = metadata.slots[group][jnp.maximum(pieces.last_row, 0)]
        page_size = kv[cache.entries].shape[1]  # in entries
        entries[compression] = EntryContext(
            pieces=pieces,
            rotation=rope_cos_sin(cfg.compress_rope, pieces.group * compression.ratio),
            slots_G=jnp.where(pieces.last_row >= 0, slots_G, -1),
            all_slots_Tk=None
            if compression.is_sparse
            else entry_slots(metadata, metadata.page_tables[group], page_size, compression.ratio),
        )
    window = caches[0].window
    return StepContext(
        metadata=metadata,
        window_rotation=rope_cos_sin(cfg.rope, metadata.positions),
        compress_rotation=rope_cos_sin(cfg.compress_rope, metadata.positions),
        window_slots_TW=window_slots(
            metadata,
            metadata.page_tables[metadata.group_of_layer[window]],
            kv[window].shape[1],
            cfg.sliding_window,
        ),
        entries=entries,
    )


def window_slots(
    metadata: AttentionMetadata, page_table_SM: jax.Array, page_size: int, window: int
) -> jax.Array:
    """i32[T, W]: the last tokens that each query sees, itself included, in order; then -1."""
    positions_T1 = metadata.positions[:, None]
    first_T1 = jnp.maximum(positions_T1 - (window - 1), 0)
    at_TW = first_T1 + jnp.arange(window, dtype=jnp.int32)[None, :]
    is_seen_TW = at_TW <= positions_T1
    at_TW = jnp.minimum(at_TW, positions_T1)
    pages_TW = page_table_SM[metadata.seq_ids[:, None], at_TW // page_size]
    return jnp.where(is_seen_TW, pages_TW * page_size + at_TW % page_size, -1)


def entry_slots(
    metadata: AttentionMetadata, page_table_SM: jax.Array, page_size: int, ratio: int
) -> jax.Array:
    """i32[T, k]: all entries that are complete when the query comes, in order; then -1.
    `page_size` counts entries."""
    num_entries = page_table_SM.shape[1] * page_size
    at_1k = jnp.arange(num_entries, dtype=jnp.int32)[None, :]
    is_seen_Tk = at_1k < ((metadata.positions + 1) // ratio)[:, None]
    pages_Tk = page_table_SM[metadata.seq_ids[:, None], at_1k // page_size]
    return jnp.where(is_seen_Tk, pages_Tk * page_size + at_1k % page_size, -1)
