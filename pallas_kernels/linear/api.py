"""`linear`: activations times a weight stored `[out, in]`, accumulated in float32; and the same
where the next operation takes something over.
"""

import jax
from jax.typing import DTypeLike

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.linear import cpu_ffi, packed_gpu, reference, triton_gpu, xla_gpu
from jengine.pallas_kernels.packed import PackedWeight, Weight, unpacked_for
from jengine.pallas_kernels.silu_mul.api import silu_mul

_linear = first_of(cpu_ffi.linear, triton_gpu.linear, xla_gpu.linear, reference.linear)


def linear(
    x_TD: jax.Array,
    w_FD: Weight,
    bias_F: jax.Array | None = None,
    *,
    num_tokens: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Return `x @ w.T + bias` of shape [T, F] in `out_dtype` (default: `x.dtype`), rounded once
    from float32.

    Rows at or past `num_tokens` are padding: finite, otherwise unspecified. The bits of a row
    depend on that row and the weight only, not on T nor on the other rows.

    A packed weight counts as what it is in the dtype of `x`. Where there are few rows a GPU unpacks
    it on the way to the product; else it is a temporary of this call.
    """
    if isinstance(w_FD, PackedWeight):
        return _packed_linear(x_TD, w_FD, bias_F, num_tokens=num_tokens, out_dtype=out_dtype)
    return _linear(x_TD, w_FD, bias_F, num_tokens=num_tokens, out_dtype=out_dtype)


def silu_linear(
    x_TD: jax.Array, w_F2D: Weight, *, num_tokens: jax.Array | None = None
) -> jax.Array:
    """Return `silu_mul(linear(x, w))`, of shape [T, F]."""
    if isinstance(w_F2D, PackedWeight):
        return _packed_silu_linear(x_TD, w_F2D, num_tokens=num_tokens)
    return _silu_linear(x_TD, w_F2D, num_tokens=num_tokens)


def _in_turn(
    x_TD: jax.Array, w_F2D: jax.Array, *, num_tokens: jax.Array | None = None
) -> jax.Array:
    return silu_mul(linear(x_TD, w_F2D, num_tokens=num_tokens), num_tokens=num_tokens)


_silu_linear = first_of(triton_gpu.silu_linear, _in_turn)


def _unpack_linear(
    x_TD: jax.Array,
    w_FD: PackedWeight,
    bias_F: jax.Array | None = None,
    *,
    num_tokens: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    return linear(*unpacked_for(x_TD, w_FD), bias_F, num_tokens=num_tokens, out_dtype=out_dtype)


def _unpack_silu_linear(
    x_TD: jax.Array, w_F2D: PackedWeight, *, num_tokens: jax.Array | None = None
) -> jax.Array:
    return silu_linear(*unpacked_for(x_TD, w_F2D), num_tokens=num_tokens)


_packed_linear = first_of(packed_gpu.linear, _unpack_linear)
_packed_silu_linear = first_of(packed_gpu.silu_linear, _unpack_silu_linear)
