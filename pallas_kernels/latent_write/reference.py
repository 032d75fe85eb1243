"""Plain-JAX `latent_write`: a loop of row updates, as in `kv_write`."""

import jax
import jax.numpy as jnp
from jax import lax


def latent_write(
    pages_PBE: jax.Array, entries_TE: jax.Array, slots_T: jax.Array, num_tokens: jax.Array
) -> jax.Array:
    P, B, E = pages_PBE.shape
    entries_TE = entries_TE.astype(pages_PBE.dtype)

    def write_row(t: jax.Array, rows: jax.Array) -> jax.Array:
        slot = slots_T[t]
        at = (jnp.maximum(slot, 0), 0)
        new = lax.dynamic_slice_in_dim(entries_TE, t, 1)
        old = lax.dynamic_slice(rows, at, new.shape)
        return lax.dynamic_update_slice(rows, jnp.where(slot >= 0, new, old), at)

    num_rows = jnp.minimum(jnp.asarray(num_tokens, jnp.int32), slots_T.shape[0])
    return lax.fori_loop(0, num_rows, write_row, pages_PBE.reshape(P * B, E)).reshape(P, B, E)
