"""`silu_mul`: SwiGLU's product of the two halves of a fused gate and up projection."""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.silu_mul import cpu_ffi, reference, triton_gpu

_silu_mul = first_of(cpu_ffi.silu_mul, triton_gpu.silu_mul, reference.silu_mul)


def silu_mul(gate_up_TF2: jax.Array, *, num_tokens: jax.Array | None = None) -> jax.Array:
    """Return `silu(gate) * up` of shape [T, F], where `gate_up` is gate and up side by side.

    Computed in float32, rounded once to the argument's dtype. Rows at or past `num_tokens` are
    padding: finite if the argument is, otherwise unspecified.
    """
    return _silu_mul(gate_up_TF2, num_tokens=num_tokens)
