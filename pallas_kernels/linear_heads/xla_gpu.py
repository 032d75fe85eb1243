"""`linear_heads` for GPUs: one batched product."""

import jax
import jax.numpy as jnp
from jax import lax

from jengine.pallas_kernels.platform import require_cuda


def linear_heads(x_TNH: jax.Array, w_NFH: jax.Array, *, num_tokens: jax.Array) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    require_cuda()
    dtype = x_TNH.dtype if x_TNH.dtype == w_NFH.dtype else jnp.dtype(jnp.float32)
    return jnp.einsum(
        "TNH,NFH->TNF",
        x_TNH.astype(dtype),
        w_NFH.astype(dtype),
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=x_TNH.dtype,
    )
