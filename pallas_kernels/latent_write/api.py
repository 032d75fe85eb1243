"""`latent_write`: put the latents of a step's new tokens into the paged cache."""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.latent_write import cpu_ffi, formula, reference, xla_gpu

_write = first_of(
    cpu_ffi.latent_write,
    xla_gpu.latent_write,
    reference.latent_write,
    formula=formula.latent_write,
)


def latent_write(
    pages_PBE: jax.Array, entries_TE: jax.Array, slots_T: jax.Array, num_tokens: jax.Array
) -> jax.Array:
    """Return the pages with the entry of token `t < num_tokens` stored at `slots[t]`; all else as
    in `kv_write`, which does the same for pairs of keys and values.
    """
    return _write(pages_PBE, entries_TE, slots_T, num_tokens)
