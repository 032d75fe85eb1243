"""`kv_write` and `latent_write` as one scatter, which can be differentiated: see `dispatch.py`."""

import jax
import jax.numpy as jnp


def kv_write(
    kv_pages_PB2KH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    slots_T: jax.Array,
    num_tokens: jax.Array,
) -> jax.Array:
    return write_rows(kv_pages_PB2KH, jnp.stack([k_TKH, v_TKH], axis=1), slots_T, num_tokens)


def write_rows(
    pages_PB: jax.Array, new_T: jax.Array, slots_T: jax.Array, num_tokens: jax.Array
) -> jax.Array:
    """Pages [P, B, ...] with the entries of `new` [T, ...] in their slots."""
    rows = pages_PB.reshape(-1, *pages_PB.shape[2:])
    is_kept_T = (slots_T >= 0) & (jnp.arange(slots_T.shape[0], dtype=jnp.int32) < num_tokens)
    slots_T = jnp.where(is_kept_T, slots_T, rows.shape[0])
    return rows.at[slots_T].set(new_T.astype(rows.dtype), mode="drop").reshape(pages_PB.shape)
