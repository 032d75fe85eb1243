"""`kv_write` for GPUs: a scatter in place, which XLA fuses with the rotation of the keys."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.platform import require_cuda


def kv_write(
    kv_pages_PB2KH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    slots_T: jax.Array,
    num_tokens: jax.Array,
) -> jax.Array:
    require_cuda()
    P, B, _, K, H = kv_pages_PB2KH.shape
    rows = kv_pages_PB2KH.reshape(P * B, 2, K, H)
    new_T2KH = jnp.stack([k_TKH, v_TKH], axis=1).astype(rows.dtype)
    token_T = jnp.arange(slots_T.shape[0], dtype=jnp.int32)
    is_real_T = (slots_T >= 0) & (token_T < num_tokens)
    # Each dropped token gets a place of its own past the end: places are declared unique.
    at_T = jnp.where(is_real_T, slots_T, P * B + token_T)
    rows = rows.at[at_T].set(new_T2KH, mode="drop", unique_indices=True)
    return rows.reshape(P, B, 2, K, H)
