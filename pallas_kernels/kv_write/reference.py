"""Plain-JAX `kv_write`: a loop of row updates, because XLA:CPU's scatter costs milliseconds a
layer.
"""

import jax
import jax.numpy as jnp
from jax import lax


def kv_write(
    kv_pages_PB2KH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    slots_T: jax.Array,
    num_tokens: jax.Array,
) -> jax.Array:
    P, B, _, K, H = kv_pages_PB2KH.shape
    rows = kv_pages_PB2KH.reshape(P * B, 2, K, H)
    new_T2KH = jnp.stack([k_TKH, v_TKH], axis=1).astype(rows.dtype)

    def write_row(t: jax.Array, rows: jax.Array) -> jax.Array:
        slot = slots_T[t]
        at = (jnp.maximum(slot, 0), 0, 0, 0)
        new = lax.dynamic_slice_in_dim(new_T2KH, t, 1)
        old = lax.dynamic_slice(rows, at, new.shape)
        return lax.dynamic_update_slice(rows, jnp.where(slot >= 0, new, old), at)

    num_rows = jnp.minimum(jnp.asarray(num_tokens, jnp.int32), slots_T.shape[0])
    return lax.fori_loop(0, num_rows, write_row, rows).reshape(P, B, 2, K, H)
