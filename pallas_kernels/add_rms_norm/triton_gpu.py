"""`add_rms_norm` of summands on NVIDIA GPUs: one kernel. A single one is left to XLA, which lets
the product before add it to `x`.
"""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.platform import require_cuda
from jengine.pallas_kernels.triton_call import Schedule, triton_call

MAX_WIDTH = 16384  # a row is one block


def add_rms_norm(
    x_TD: jax.Array,
    parts_PTD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    (P, T, D) = parts_PTD.shape
    if P == 1 or D > MAX_WIDTH:
        raise NotImplementedError(f"summands {parts_PTD.shape}")
    require_cuda()
    from jengine.pallas_kernels.add_rms_norm.triton_kernels import add_and_norm

    num_tokens = jnp.asarray(T if num_tokens is None else num_tokens, jnp.int32)
    row = jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)
    x_TD, normed_TD = triton_call(
        add_and_norm,
        (x_TD, parts_PTD, weight_D, num_tokens.reshape(1)),
        [row, row],
        grid=(T,),
        constants={"T": T, "D": D, "DP": 1 << (D - 1).bit_length(), "P": P, "EPS": float(eps)},
        schedule=Schedule(num_warps=16 if D >= 4096 else 8, num_stages=1),
    )
    return x_TD, normed_TD
