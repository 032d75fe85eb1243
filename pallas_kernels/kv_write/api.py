"""`kv_write`: put the keys and values of a step's new tokens into the paged cache."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jengine.pallas_kernels import native
from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.kv_write import cpu_ffi, formula, reference, xla_gpu
from jengine.pallas_kernels.platform import platform

_write = first_of(cpu_ffi.kv_write, xla_gpu.kv_write, reference.kv_write, formula=formula.kv_write)


def kv_write(
    kv_pages_PB2KH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    slots_T: jax.Array,
    num_tokens: jax.Array,
) -> jax.Array:
    """Return the pages with `k`, `v` of token `t < num_tokens` stored at `slots[t] = page_id * B +
    offset`.

    A negative slot drops its token. Slots of one step are distinct. Values are converted to the
    pages' dtype. Updates in place: under jit, donate the pages and rebind them in the same
    statement, else XLA copies them.
    """
    return _write(kv_pages_PB2KH, k_TKH, v_TKH, slots_T, num_tokens)


def is_in_place(page_dtype: DTypeLike) -> bool:
    """Whether a write costs what it writes, rather than a pass over the whole cache.

    It does not for bfloat16 in plain JAX on CPU before 0.11: XLA widens the pages to float32 and
    back around every update (100 ms a layer for 50 MB), and around every attention call that reads
    them. Keep float32 pages there.
    """
    is_old_cpu = platform() == "cpu" and jax.__version_info__ < (0, 11)
    return not is_old_cpu or jnp.dtype(page_dtype) != jnp.bfloat16 or native.is_available()
