"""`rms_norm`: root-mean-square normalisation of rows, the same bits for a row in any batch."""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.rms_norm import cpu_ffi, reference, triton_gpu, xla_gpu

_norm = first_of(cpu_ffi.rms_norm, triton_gpu.rms_norm, xla_gpu.rms_norm, reference.rms_norm)


def rms_norm(
    x_TD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    num_tokens: jax.Array | None = None,
) -> jax.Array:
    """Return `x / sqrt(mean(x^2) + eps)`, rounded to `x.dtype`, times `weight`, rounded again: as
    Hugging Face's Llama does it. Sums and products are float32.

    Rows at or past `num_tokens` are padding: finite, otherwise unspecified.
    """
    return _norm(x_TD, weight_D, eps=eps, num_tokens=num_tokens)
