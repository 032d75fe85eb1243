"""`latent_write` as one scatter, which can be differentiated: see `dispatch.py`."""

import jax

from jengine.pallas_kernels.kv_write.formula import write_rows


def latent_write(
    pages_PBE: jax.Array, entries_TE: jax.Array, slots_T: jax.Array, num_tokens: jax.Array
) -> jax.Array:
    return write_rows(pages_PBE, entries_TE, slots_T, num_tokens)
