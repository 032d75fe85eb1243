"""`log_softmax_rows`: log-probabilities of rows of logits, the same bits for a row in any batch."""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.log_softmax_rows import reference, triton_gpu

_log_softmax_rows = first_of(triton_gpu.log_softmax_rows, reference.log_softmax_rows)


def log_softmax_rows(x_SV: jax.Array) -> jax.Array:
    """Return `x - log(sum(exp(x)))` of each row, float32 [S, V]. Entries may be -inf."""
    return _log_softmax_rows(x_SV)
