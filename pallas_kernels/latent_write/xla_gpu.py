"""`latent_write` for GPUs: a scatter in place, as in `kv_write`."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.platform import require_cuda


def latent_write(
    pages_PBE: jax.Array, entries_TE: jax.Array, slots_T: jax.Array, num_tokens: jax.Array
) -> jax.Array:
    require_cuda()
    P, B, E = pages_PBE.shape
    token_T = jnp.arange(slots_T.shape[0], dtype=jnp.int32)
    is_real_T = (slots_T >= 0) & (token_T < num_tokens)
    # Each dropped token gets a place of its own past the end: places are declared unique.
    at_T = jnp.where(is_real_T, slots_T, P * B + token_T)
    rows = pages_PBE.reshape(P * B, E)
    rows = rows.at[at_T].set(entries_TE.astype(rows.dtype), mode="drop", unique_indices=True)
    return rows.reshape(P, B, E)
