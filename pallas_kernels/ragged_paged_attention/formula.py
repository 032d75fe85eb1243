"""Attention over pages, one sequence after the other, all of its scores at once: no loop whose trip
count is data, so that it can be differentiated (see `dispatch.py`).
"""

import jax
import jax.numpy as jnp
from jax import lax

from jengine.pallas_kernels.ragged_paged_attention.reference import Split, split_pairs


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
    return attend_whole(
        q_TNH,
        kv_pages_PB2KH,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        num_seqs,
        split=split_pairs,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
    )


def attend_whole(
    q_TNH: jax.Array,
    pages_PB: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    split: Split,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """As the reference's `attend_pages`, in float32. A sequence's scores [N, T, L] are computed
    again on the way back, not kept.
    """
    T, N, _ = q_TNH.shape
    index_T = jnp.arange(T, dtype=jnp.int32)
    index_L = jnp.arange(page_table_SM.shape[1] * pages_PB.shape[1], dtype=jnp.int32)

    @jax.checkpoint
    def of_sequence(s: jax.Array) -> jax.Array:
        start, stop, kv_len = cu_q_lens_S1[s], cu_q_lens_S1[s + 1], kv_lens_S[s]
        is_own_T = (index_T >= start) & (index_T < stop) & (s < num_seqs)
        position_T = kv_len - stop + index_T
        is_live_L = index_L < kv_len
        entries_L = pages_PB[page_table_SM[s]].reshape(-1, *pages_PB.shape[2:])
        is_live = is_live_L.reshape(-1, *(1 for _ in entries_L.shape[1:]))
        entries_L = jnp.where(is_live, entries_L.astype(jnp.float32), 0.0)
        k_KLH, v_KLV = split(entries_L)
        q_TKGH = q_TNH.astype(jnp.float32).reshape(T, k_KLH.shape[0], -1, q_TNH.shape[2])
        s_KGTL = scale * _dot("TKGH,KLH->KGTL", q_TKGH, k_KLH)
        if soft_cap is not None:
            s_KGTL = soft_cap * jnp.tanh(s_KGTL / soft_cap)
        is_seen_TL = is_live_L[None] & (index_L[None] <= position_T[:, None])
        if window is not None:
            is_seen_TL &= index_L[None] > position_T[:, None] - window
        # A row of another sequence sees slot 0: minus infinity alone has no derivative.
        is_seen_TL = jnp.where(is_own_T[:, None], is_seen_TL, index_L[None] == 0)
        s_NTL = jnp.where(is_seen_TL[None, None], s_KGTL, -jnp.inf).reshape(N, T, -1)
        out_TNV = _attended(s_NTL, v_KLV, sinks_N)
        return jnp.where(is_own_T[:, None, None], out_TNV, 0.0)

    def add(out_TNV: jax.Array, s: jax.Array) -> tuple[jax.Array, None]:
        return out_TNV + of_sequence(s), None

    shape = jax.eval_shape(of_sequence, jnp.int32(0)).shape
    sequences = jnp.arange(kv_lens_S.shape[0], dtype=jnp.int32)
    out_TNV, _ = lax.scan(add, jnp.zeros(shape, jnp.float32), sequences)
    return out_TNV.astype(q_TNH.dtype)


def _attended(s_NTL: jax.Array, v_KLV: jax.Array, sinks_N: jax.Array | None) -> jax.Array:
    """[T, N, V]: values by the softmax of scores, to whose sum a sink adds."""
    N, T, L = s_NTL.shape
    if sinks_N is not None:
        sinks_NT1 = jnp.broadcast_to(sinks_N.astype(jnp.float32)[:, None, None], (N, T, 1))
        s_NTL = jnp.concatenate([s_NTL, sinks_NT1], axis=-1)
    p_NTL = jax.nn.softmax(s_NTL, axis=-1)[..., :L]
    out_TKGV = _dot("KGTL,KLV->TKGV", p_NTL.reshape(v_KLV.shape[0], -1, T, L), v_KLV)
    return out_TKGV.reshape(T, N, -1)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(
        spec, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
