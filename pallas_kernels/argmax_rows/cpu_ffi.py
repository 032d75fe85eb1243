"""`argmax_rows` in C++ (`native/src/rows.cc`)."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels import native

TARGET = "jengine_argmax_rows"


def argmax_rows(logits_SV: jax.Array) -> jax.Array:
    if logits_SV.dtype != jnp.float32 or logits_SV.shape[1] == 0:
        raise NotImplementedError(f"{logits_SV.dtype}{logits_SV.shape}")
    native.require()
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(logits_SV.shape[:1], jnp.int32))
    return call(logits_SV)
