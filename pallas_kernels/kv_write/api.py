"""`kv_write`: put the keys and values of a step's new tokens into their slots of the paged cache."""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.kv_write import cpu_ffi, reference

_write = first_of(cpu_ffi.kv_write, reference.kv_write)


def kv_write(
    kv_pages_PB2KH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    slots_T: jax.Array,
    num_tokens: jax.Array,
) -> jax.Array:
    """Return the pages with `k`, `v` of token `t < num_tokens` stored at `slots[t] = page_id * B + offset`.

    A negative slot drops its token. Slots of one step are distinct. Values are converted to the pages' dtype.
    Updates in place: under jit, donate the pages and rebind them in the same statement, else XLA copies them.
    """
    return _write(kv_pages_PB2KH, k_TKH, v_TKH, slots_T, num_tokens)
