"""`add_rms_norm` on NVIDIA GPUs: one kernel. Where a row's bits may depend on its batch, a single
summand of many rows is left to XLA, which lets the product before add it to `x`.
"""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.linear.triton_gpu import MAX_ROWS
from jengine.pallas_kernels.platform import is_batch_invariant, require_cuda
from jengine.pallas_kernels.rms_norm.triton_gpu import MAX_WIDTH, row_schedule
from jengine.pallas_kernels.triton_call import triton_call


def add_rms_norm(
    x_TD: jax.Array,
    parts_PTD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    (P, T, D) = parts_PTD.shape
    is_xlas = P == 1 and T > MAX_ROWS and not is_batch_invariant()
    if D > MAX_WIDTH or is_xlas:
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
        schedule=row_schedule(D),
    )
    return x_TD, normed_TD
