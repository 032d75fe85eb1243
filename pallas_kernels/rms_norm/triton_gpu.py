"""`rms_norm` on NVIDIA GPUs where a row's bits must not depend on its batch: XLA sums rows in an
order that depends on how many there are.
"""

import jax

from jengine.pallas_kernels.platform import is_batch_invariant, require_cuda
from jengine.pallas_kernels.triton_call import Schedule, triton_call

MAX_WIDTH = 16384  # a row is one block


def rms_norm(
    x_TD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    num_tokens: jax.Array | None = None,
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    T, D = x_TD.shape
    if D > MAX_WIDTH or not is_batch_invariant():
        raise NotImplementedError(f"rows of {D}")
    require_cuda()
    from jengine.pallas_kernels.rms_norm.triton_kernels import norm_row

    return triton_call(
        norm_row,
        (x_TD, weight_D),
        [jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)],
        grid=(T,),
        constants={"D": D, "DP": 1 << (D - 1).bit_length(), "EPS": float(eps)},
        schedule=row_schedule(D),
    )[0]


def row_schedule(width: int) -> Schedule:
    """Of a program that has one row in its registers."""
    return Schedule(num_warps=16 if width >= 4096 else 8 if width >= 1024 else 1, num_stages=1)
