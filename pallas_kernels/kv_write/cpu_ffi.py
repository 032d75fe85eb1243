"""`kv_write` in C++ (`native/src/rows.cc`): in the pages' own buffer."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels import native

TARGET = "jengine_kv_write"
DTYPES = ("bfloat16", "float32")


def kv_write(
    kv_pages_PB2KH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    slots_T: jax.Array,
    num_tokens: jax.Array,
) -> jax.Array:
    if (
        kv_pages_PB2KH.dtype not in DTYPES
        or k_TKH.dtype not in DTYPES
        or v_TKH.dtype != k_TKH.dtype
    ):
        raise NotImplementedError(
            f"{kv_pages_PB2KH.dtype} pages, {k_TKH.dtype} keys, {v_TKH.dtype} values"
        )
    native.require()
    call = jax.ffi.ffi_call(
        TARGET,
        jax.ShapeDtypeStruct(kv_pages_PB2KH.shape, kv_pages_PB2KH.dtype),
        input_output_aliases={0: 0},
    )
    return call(
        kv_pages_PB2KH, k_TKH, v_TKH, slots_T, jnp.asarray(num_tokens, jnp.int32).reshape(1)
    )
