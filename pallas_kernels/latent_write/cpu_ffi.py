"""`latent_write` in C++: that of `kv_write`, to which the halves of an entry are key and value."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels import native
from jengine.pallas_kernels.kv_write.cpu_ffi import DTYPES, TARGET


def latent_write(
    pages_PBE: jax.Array, entries_TE: jax.Array, slots_T: jax.Array, num_tokens: jax.Array
) -> jax.Array:
    if pages_PBE.dtype not in DTYPES or entries_TE.dtype not in DTYPES:
        raise NotImplementedError(f"{pages_PBE.dtype} pages, {entries_TE.dtype} entries")
    if pages_PBE.shape[2] % 2:
        raise NotImplementedError(f"{pages_PBE.shape[2]} values in an entry")
    native.require()
    call = jax.ffi.ffi_call(
        TARGET,
        jax.ShapeDtypeStruct(pages_PBE.shape, pages_PBE.dtype),
        input_output_aliases={0: 0},
    )
    halves = jnp.split(entries_TE, 2, axis=1)
    # The pages go in as they are: XLA:CPU would copy them before and after a reshape.
    return call(pages_PBE, *halves, slots_T, jnp.asarray(num_tokens, jnp.int32).reshape(1))
