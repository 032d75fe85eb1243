"""`linear_heads`: every head's activations times a weight of that head's own."""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.linear import packed_gpu
from jengine.pallas_kernels.linear_heads import reference, xla_gpu
from jengine.pallas_kernels.packed import PackedWeight, Weight, unpacked_for

_linear_heads = first_of(xla_gpu.linear_heads, reference.linear_heads)


def linear_heads(x_TNH: jax.Array, w_NFH: Weight, *, num_tokens: jax.Array) -> jax.Array:
    """Return [T, N, F] in `x.dtype`: `x[:, n] @ w[n].T`, rounded once from float32.

    Rows at or past `num_tokens` are padding: finite, otherwise unspecified. The bits of a row
    depend on that row and the weight only, not on T nor on the other rows. A packed weight: see
    `linear`.
    """
    if isinstance(w_NFH, PackedWeight):
        return _packed_linear_heads(x_TNH, w_NFH, num_tokens=num_tokens)
    return _linear_heads(x_TNH, w_NFH, num_tokens=num_tokens)


def _unpack(x_TNH: jax.Array, w_NFH: PackedWeight, *, num_tokens: jax.Array) -> jax.Array:
    return linear_heads(*unpacked_for(x_TNH, w_NFH), num_tokens=num_tokens)


_packed_linear_heads = first_of(packed_gpu.linear_heads, _unpack)
