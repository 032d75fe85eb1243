"""Plain-JAX ragged paged attention: loops over sequences, query tiles and KV blocks whose cost
follows real lengths.

Flash attention with KV blocks that start at fixed multiples of the block size, so that a row meets
the same blocks in the same order in every batch and chunking. All tiles have one shape, a decode
row's too: XLA:CPU's float32 sums and exponentials give a row other bits when the shape around it
changes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

QUERY_TILE = 8
KV_BLOCK = 128

# Entries of some slots, [C, ...] as the pages keep them -> their keys [K, C, H] and values
# [K, C, V].
Split = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def ragged_paged_attention(
    q_TNH: jax.Array,
    kv_pages_PB2KH: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    is_decode: bool = False,
) -> jax.Array:
    del is_decode  # the same code for both
    return attend_pages(
        q_TNH,
        kv_pages_PB2KH,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        num_seqs,
        split=split_pairs,
        kv_heads=kv_pages_PB2KH.shape[3],
        value_dim=q_TNH.shape[2],
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
    )


def split_pairs(kv_C2KH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values that lie side by side."""
    return kv_C2KH[:, 0].transpose(1, 0, 2), kv_C2KH[:, 1].transpose(1, 0, 2)


def attend_pages(
    q_TNH: jax.Array,
    pages_PB: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    split: Split,
    kv_heads: int,
    value_dim: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """[T, N, V] of pages [P, B, ...] whose entries `split` turns into keys and values."""
    (T, N, H), K, V = q_TNH.shape, kv_heads, value_dim
    B = pages_PB.shape[1]
    block_pages = max(1, KV_BLOCK // B)
    # Dynamic slices clamp at the end of the array and would shift: pad so that none reaches it.
    q_TKGH = jnp.pad(q_TNH, ((0, QUERY_TILE), (0, 0), (0, 0))).reshape(-1, K, N // K, H)
    page_table_SM = jnp.pad(page_table_SM, ((0, 0), (0, -page_table_SM.shape[1] % block_pages)))
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(K, N // K)
    attend = partial(
        _attend_tile,
        pages_PB=pages_PB,
        split=split,
        value_dim=V,
        sinks_KG=sinks_KG,
        block_pages=block_pages,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )

    def run_sequence(s: jax.Array, out_TKGV: jax.Array) -> jax.Array:
        start, q_len, kv_len = cu_q_lens_S1[s], cu_q_lens_S1[s + 1] - cu_q_lens_S1[s], kv_lens_S[s]

        def run_tile(i: jax.Array, out_TKGV: jax.Array) -> jax.Array:
            # A tile may write past the sequence's last token: the next sequence then writes over
            # it.
            at = start + i * QUERY_TILE
            q = lax.dynamic_slice_in_dim(q_TKGH, at, QUERY_TILE)
            position = kv_len - q_len + i * QUERY_TILE
            new = attend(q, page_table_M=page_table_SM[s], position=position, kv_len=kv_len)
            return lax.dynamic_update_slice_in_dim(out_TKGV, new, at, 0)

        num_tiles = lax.div(q_len + QUERY_TILE - 1, jnp.int32(QUERY_TILE))
        return lax.fori_loop(0, num_tiles, run_tile, out_TKGV)

    out_TKGV = jnp.zeros((*q_TKGH.shape[:-1], V), q_TNH.dtype)
    out_TKGV = lax.fori_loop(0, jnp.asarray(num_seqs, jnp.int32), run_sequence, out_TKGV)
    return out_TKGV[:T].reshape(T, N, V)


def _attend_tile(
    q_QKGH: jax.Array,
    *,
    page_table_M: jax.Array,
    position: jax.Array,
    kv_len: jax.Array,
    pages_PB: jax.Array,
    split: Split,
    value_dim: int,
    sinks_KG: jax.Array | None,
    block_pages: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """Attention of consecutive queries of one sequence, the first at `position`."""
    Q, K, G, H = q_QKGH.shape
    B, entry_shape = pages_PB.shape[1], pages_PB.shape[2:]
    C = block_pages * B
    rows = Q * G
    dtype = q_QKGH.dtype if q_QKGH.dtype == pages_PB.dtype else jnp.dtype(jnp.float32)
    q_KRH = q_QKGH.transpose(1, 0, 2, 3).reshape(K, rows, H).astype(dtype)
    position_R = position + lax.div(lax.iota(jnp.int32, rows), jnp.int32(G))
    first_R = jnp.zeros_like(position_R) if window is None else position_R - (window - 1)

    def load(block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        pages = lax.dynamic_slice_in_dim(page_table_M, block * block_pages, block_pages)
        entries_C = pages_PB[pages].reshape(C, *entry_shape).astype(dtype)
        index_C = block * C + lax.iota(jnp.int32, C)
        is_live_C = (index_C < kv_len) & (index_C >= first_R[0])
        entries_C = jnp.where(
            is_live_C.reshape(C, *(1 for _ in entry_shape)), entries_C, jnp.zeros((), dtype)
        )  # unused slots: NaN
        is_seen_RC = (index_C[None, :] <= position_R[:, None]) & (
            index_C[None, :] >= first_R[:, None]
        )
        return (*split(entries_C), is_seen_RC & is_live_C[None, :])

    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None  # not TF32

    def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        block, max_KR, sum_KR, acc_KRV = carry
        k_KCH, v_KCV, is_seen_RC = load(block)
        s_KRC = scale * jnp.einsum(
            "KRH,KCH->KRC",
            q_KRH,
            k_KCH,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        if soft_cap is not None:
            s_KRC = soft_cap * jnp.tanh(s_KRC / soft_cap)
        s_KRC = jnp.where(is_seen_RC[None], s_KRC, -jnp.inf)
        new_max_KR = jnp.maximum(max_KR, s_KRC.max(axis=-1))
        base_KR = jnp.where(
            new_max_KR == -jnp.inf, 0.0, new_max_KR
        )  # nothing seen yet: exp(-inf - 0) = 0
        p_KRC = jnp.exp(s_KRC - base_KR[..., None])
        decay_KR = jnp.exp(max_KR - base_KR)
        pv_KRV = jnp.einsum(
            "KRC,KCV->KRV",
            p_KRC.astype(dtype),
            v_KCV,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        sum_KR = sum_KR * decay_KR + p_KRC.sum(axis=-1)
        return block + 1, new_max_KR, sum_KR, acc_KRV * decay_KR[..., None] + pv_KRV

    if sinks_KG is None:
        max_KR, sum_KR = jnp.full((K, rows), -jnp.inf), jnp.zeros((K, rows))
    else:
        max_KR, sum_KR = jnp.tile(sinks_KG, (1, Q)), jnp.ones((K, rows))
    begin = lax.div(jnp.maximum(first_R[0], 0), jnp.int32(C))
    end = lax.div(jnp.minimum(kv_len, position + Q) + (C - 1), jnp.int32(C))
    carry = (begin, max_KR, sum_KR, jnp.zeros((K, rows, value_dim)))
    _, _, sum_KR, acc_KRV = lax.while_loop(lambda carry: carry[0] < end, step, carry)
    out_KRV = acc_KRV / jnp.where(sum_KR == 0.0, 1.0, sum_KR)[..., None]
    return out_KRV.reshape(K, Q, G, value_dim).transpose(1, 0, 2, 3).astype(q_QKGH.dtype)
