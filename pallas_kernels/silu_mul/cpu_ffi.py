"""`silu_mul` in C++ (`native/src/rows.cc`)."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels import native

TARGET = "jengine_silu_mul"
DTYPES = ("bfloat16", "float32")


def silu_mul(gate_up_TF2: jax.Array, *, num_tokens: jax.Array | None = None) -> jax.Array:
    if gate_up_TF2.dtype not in DTYPES:
        raise NotImplementedError(f"{gate_up_TF2.dtype} rows")
    native.require()
    T, width = gate_up_TF2.shape
    rows = jnp.asarray(T if num_tokens is None else num_tokens, jnp.int32).reshape(1)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((T, width // 2), gate_up_TF2.dtype))
    return call(gate_up_TF2, rows)
