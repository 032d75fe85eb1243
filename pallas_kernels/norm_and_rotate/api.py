"""`norm_and_rotate`: heads normed without a scale, then rotated at their ends (the queries of
DeepSeek-V4, arXiv:2606.19348).
"""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.norm_and_rotate import reference, triton_gpu

_norm = first_of(triton_gpu.norm_and_rotate, reference.norm_and_rotate)


def norm_and_rotate(
    x_TNH: jax.Array,
    cos_TR: jax.Array,
    sin_TR: jax.Array,
    num_tokens: jax.Array,
    *,
    eps: float,
) -> jax.Array:
    """Return `x / sqrt(mean(x^2) + eps)`, computed in float32 and rounded to `x.dtype`, of whose
    last 2 R values each pair, side by side, is rotated in float32 and rounded again. Cosines and
    sines are float32, [T, R].

    Rows past the last token are finite, otherwise unspecified.
    """
    return _norm(x_TNH, cos_TR, sin_TR, num_tokens, eps=eps)
