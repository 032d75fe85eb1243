"""Paged attention as a layer sees it: write the new keys and values, then read the context through
the page table.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jengine.kv_spec import KVSpec
from jengine.layers.norm import RMSNorm
from jengine.pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from jengine.pallas_kernels.rotate_and_write.api import rotate_and_write


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Where a step's packed tokens belong. One page table and one slot mapping per KV group."""

    positions: jax.Array  # i32[T]
    seq_ids: jax.Array  # i32[T]; of padding any
    cu_q_lens: jax.Array  # i32[S+1]; sequence s owns tokens cu_q_lens[s]:cu_q_lens[s+1]
    kv_lens: jax.Array  # i32[S]; context length after this step
    num_tokens: jax.Array  # i32[]; real tokens, the rest is padding
    num_seqs: jax.Array  # i32[]
    page_tables: tuple[jax.Array, ...]  # per group, i32[S, pages_per_seq]
    # per group, i32[T]: where the entry lies that the token completes; of states i32[2, S].
    # Negative: nowhere
    slots: tuple[jax.Array, ...]
    group_of_layer: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    is_decode: bool = dataclasses.field(default=False, metadata={"static": True})


def rotary_paged_attention(
    qkv_PTXH: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    kv_pages: jax.Array,
    metadata: AttentionMetadata,
    *,
    dtype: DTypeLike,
    layer: int,
    spec: KVSpec,
    scale: float,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    head_norms: tuple[RMSNorm, RMSNorm] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of the step's tokens over their contexts, new tokens included.

    `qkv` holds the heads of queries, keys and values as `Linear.parts` gives them, and is rounded
    to `dtype`; `rotation` is `rope_cos_sin`'s; `head_norms` (of queries, of keys) come before it.
    `kv_pages` is [P, B, 2, K, H] and is consumed: the caller keeps only the returned array, which
    aliases it. Returns (out [T, N, H], kv_pages).
    """
    group = metadata.group_of_layer[layer]
    q_norm, k_norm = head_norms or (None, None)
    q_TNH, kv_pages = rotate_and_write(
        qkv_PTXH,
        *rotation,
        kv_pages,
        metadata.slots[group],
        metadata.num_tokens,
        dtype=dtype,
        q_norm_H=None if q_norm is None else q_norm.weight[...],
        k_norm_H=None if k_norm is None else k_norm.weight[...],
        eps=0.0 if q_norm is None else q_norm.eps,
    )
    out = ragged_paged_attention(
        q_TNH,
        kv_pages,
        metadata.page_tables[group],
        metadata.cu_q_lens,
        metadata.kv_lens,
        metadata.num_seqs,
        scale=scale,
        window=spec.window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
        is_decode=metadata.is_decode,
    )
    return out, kv_pages


def slot_mapping(
    page_table_SM: jax.Array,
    seq_ids_T: jax.Array,
    positions_T: jax.Array,
    num_tokens: jax.Array,
    page_size: int,
    tokens_per_entry: int = 1,
) -> jax.Array:
    """i32[T]: slot = page_id * page_size + offset of each new token, -1 for padding. With more
    `tokens_per_entry` than one both are counted in entries, and tokens that complete none have -1.
    """
    pages = page_table_SM[seq_ids_T, positions_T // page_size]
    is_real = jnp.arange(positions_T.shape[0], dtype=jnp.int32) < num_tokens
    entries_per_page = page_size // tokens_per_entry
    slots = pages * entries_per_page + positions_T % page_size // tokens_per_entry
    is_last = positions_T % tokens_per_entry == tokens_per_entry - 1
    return jnp.where(is_real & is_last, slots, -1)


def state_slots(
    page_table_SM: jax.Array, cu_q_lens_S1: jax.Array, kv_lens_S: jax.Array, page_size: int
) -> jax.Array:
    """i32[2, S]: the page that each sequence's state is read from, -1 at its beginning, and the one
    where it is left; -1 for both without tokens.
    """
    lens_S = cu_q_lens_S1[1:] - cu_q_lens_S1[:-1]
    ends_2S = jnp.stack([kv_lens_S - lens_S, kv_lens_S])
    seqs_2S = jnp.broadcast_to(jnp.arange(kv_lens_S.shape[0], dtype=jnp.int32), ends_2S.shape)
    pages_2S = page_table_SM[seqs_2S, jnp.maximum(ends_2S - 1, 0) // page_size]
    return jnp.where((ends_2S > 0) & (lens_S > 0)[None, :], pages_2S, -1)
