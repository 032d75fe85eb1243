"""Ragged paged attention in C++ (`native/src/attention.cc`)."""

import jax
import jax.numpy as jnp
import numpy as np

from jengine.pallas_kernels import native

TARGET = "jengine_ragged_paged_attention"
DTYPES = ("bfloat16", "float32")
MAX_HEAD_DIM = 256
LANES = 16


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
    H = q_TNH.shape[2]
    if q_TNH.dtype not in DTYPES or kv_pages_PB2KH.dtype not in DTYPES:
        raise NotImplementedError(f"{q_TNH.dtype} queries, {kv_pages_PB2KH.dtype} pages")
    if H % LANES or H > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"head dim {H}: must be a multiple of {LANES} up to {MAX_HEAD_DIM}"
        )
    native.require()
    sinks = jnp.zeros((0,), jnp.float32) if sinks_N is None else sinks_N.astype(jnp.float32)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype))
    return call(
        q_TNH,
        kv_pages_PB2KH,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        jnp.asarray(num_seqs, jnp.int32).reshape(1),
        sinks,
        scale=np.float32(scale),
        window=np.int64(window or 0),
        soft_cap=np.float32(soft_cap or 0.0),
    )
