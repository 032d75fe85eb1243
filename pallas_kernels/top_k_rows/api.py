"""`top_k_rows`: the few largest values of each row, in order."""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.top_k_rows import reference, xla_gpu

_top_k = first_of(xla_gpu.top_k_rows, reference.top_k_rows)


def top_k_rows(x_SV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Return (values f32[S, k], indices i32[S, k]): the largest first, equal ones by their index.

    `k` is small (tens) and at most V. Not for rows with NaN: their indices are in range, no more.
    """
    return _top_k(x_SV, k)
