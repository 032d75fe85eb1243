"""`linear` in C++ (`native/src/linear.cc`)."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jengine.pallas_kernels import native

TARGET = "jengine_linear"
DTYPES = (("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32"))  # (x, w)


def linear(
    x_TD: jax.Array,
    w_FD: jax.Array,
    bias_F: jax.Array | None = None,
    *,
    num_tokens: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    (T, D), F = x_TD.shape, w_FD.shape[0]
    out_dtype = jnp.dtype(x_TD.dtype if out_dtype is None else out_dtype)
    if (x_TD.dtype.name, w_FD.dtype.name) not in DTYPES or out_dtype.name not in (
        "bfloat16",
        "float32",
    ):
        raise NotImplementedError(f"{x_TD.dtype} x {w_FD.dtype} -> {out_dtype}")
    if x_TD.dtype == jnp.bfloat16 and D % 2:
        raise NotImplementedError("bfloat16 is read in pairs: odd depth")
    native.require()
    bias = jnp.zeros((0,), jnp.float32) if bias_F is None else bias_F.astype(jnp.float32)
    rows = jnp.asarray(T if num_tokens is None else num_tokens, jnp.int32).reshape(1)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((T, F), out_dtype))
    return call(x_TD, w_FD, bias, rows)
