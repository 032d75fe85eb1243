"""`rms_norm` in C++ (`native/src/rows.cc`)."""

import jax
import jax.numpy as jnp
import numpy as np

from jengine.pallas_kernels import native

TARGET = "jengine_rms_norm"
DTYPES = ("bfloat16", "float32")


def rms_norm(
    x_TD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    num_tokens: jax.Array | None = None,
) -> jax.Array:
    if x_TD.dtype not in DTYPES:
        raise NotImplementedError(f"{x_TD.dtype} rows")
    native.require()
    rows = jnp.asarray(x_TD.shape[0] if num_tokens is None else num_tokens, jnp.int32).reshape(1)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype))
    return call(x_TD, weight_D.astype(jnp.float32), rows, eps=np.float32(eps))
