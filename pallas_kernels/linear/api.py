"""`linear`: activations times a weight stored `[out, in]`, accumulated in float32; and the same
where the next operation takes something over.
"""

import jax
from jax.typing import DTypeLike

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.linear import cpu_ffi, reference, triton_gpu, xla_gpu
from jengine.pallas_kernels.silu_mul.api import silu_mul

_linear = first_of(cpu_ffi.linear, triton_gpu.linear, xla_gpu.linear, reference.linear)


def linear(
    x_TD: jax.Array,
    w_FD: jax.Array,
    bias_F: jax.Array | None = None,
    *,
    num_tokens: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Return `x @ w.T + bias` of shape [T, F] in `out_dtype` (default: `x.dtype`), rounded once
    from float32.

    Rows at or past `num_tokens` are padding: finite, otherwise unspecified. The bits of a row
    depend on that row and the weight only, not on T nor on the other rows.
    """
    return _linear(x_TD, w_FD, bias_F, num_tokens=num_tokens, out_dtype=out_dtype)


def silu_linear(
    x_TD: jax.Array, w_F2D: jax.Array, *, num_tokens: jax.Array | None = None
) -> jax.Array:
    """Return `silu_mul(linear(x, w))`, of shape [T, F]."""
    return _silu_linear(x_TD, w_F2D, num_tokens=num_tokens)


def _in_turn(
    x_TD: jax.Array, w_F2D: jax.Array, *, num_tokens: jax.Array | None = None
) -> jax.Array:
    return silu_mul(linear(x_TD, w_F2D, num_tokens=num_tokens), num_tokens=num_tokens)


_silu_linear = first_of(triton_gpu.silu_linear, _in_turn)
