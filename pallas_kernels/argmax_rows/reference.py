"""Plain-JAX `argmax_rows`: two vectorised reductions. XLA:CPU runs `jnp.argmax` as a scalar loop
over pairs.
"""

import jax
import jax.numpy as jnp
from jax import lax


def argmax_rows(logits_SV: jax.Array) -> jax.Array:
    V = logits_SV.shape[1]
    best_S1 = jnp.max(logits_SV, axis=1, keepdims=True)
    index_SV = lax.broadcasted_iota(jnp.int32, logits_SV.shape, 1)
    is_nan_SV = jnp.isnan(logits_SV)  # looked for by itself: XLA:CPU's maximum may lose a NaN
    has_nan_S1 = jnp.any(is_nan_SV, axis=1, keepdims=True)
    is_best_SV = jnp.where(has_nan_S1, is_nan_SV, logits_SV == best_S1)
    return jnp.min(jnp.where(is_best_SV, index_SV, V), axis=1)
