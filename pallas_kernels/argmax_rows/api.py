"""`argmax_rows`: the greedy token of each row of logits."""

import jax

from jengine.pallas_kernels.argmax_rows import cpu_ffi, reference, xla_gpu
from jengine.pallas_kernels.dispatch import first_of

_argmax = first_of(cpu_ffi.argmax_rows, xla_gpu.argmax_rows, reference.argmax_rows)


def argmax_rows(logits_SV: jax.Array) -> jax.Array:
    """Return i32[S]: the first index of each row's largest value, or of its first NaN, as
    `jnp.argmax`.
    """
    return _argmax(logits_SV)
