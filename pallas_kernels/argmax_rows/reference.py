"""Plain-JAX `argmax_rows`: two vectorised reductions. XLA:CPU runs `jnp.argmax` as a scalar loop over pairs."""

import jax
import jax.numpy as jnp
from jax import lax


def argmax_rows(logits_SV: jax.Array) -> jax.Array:
    V = logits_SV.shape[1]
    best_S1 = jnp.max(logits_SV, axis=1, keepdims=True)
    index_SV = lax.broadcasted_iota(jnp.int32, logits_SV.shape, 1)
    is_best_SV = (logits_SV == best_S1) | jnp.isnan(logits_SV)  # best is NaN, equal to nothing, if the row has one
    return jnp.min(jnp.where(is_best_SV, index_SV, V), axis=1)
