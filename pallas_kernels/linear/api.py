"""`linear`: activations times a weight stored `[out, in]`, accumulated in float32."""

import jax
from jax.typing import DTypeLike

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.linear import cpu_ffi, reference, xla_gpu

_linear = first_of(cpu_ffi.linear, xla_gpu.linear, reference.linear)


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
