"""`norm_and_rotate` on NVIDIA GPUs: one kernel, where XLA needs three."""

import jax

from jengine.pallas_kernels.platform import require_cuda
from jengine.pallas_kernels.triton_call import Schedule, triton_call

DTYPES = ("bfloat16", "float16", "float32")
MAX_DIM = 8192
VALUES = 2048  # of a program


def norm_and_rotate(
    x_TNH: jax.Array,
    cos_TR: jax.Array,
    sin_TR: jax.Array,
    num_tokens: jax.Array,
    *,
    eps: float,
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    (T, N, H), pairs = x_TNH.shape, cos_TR.shape[1]
    if x_TNH.dtype not in DTYPES or H > MAX_DIM:
        raise NotImplementedError(f"{x_TNH.dtype} vectors of {H}")
    require_cuda()
    from jengine.pallas_kernels.norm_and_rotate.triton_kernels import norm_rows

    padded = 1 << (H - 1).bit_length()
    rows = min(max(1, VALUES // padded), 1 << (T * N - 1).bit_length())
    return triton_call(
        norm_rows,
        (x_TNH, cos_TR, sin_TR),
        [jax.ShapeDtypeStruct(x_TNH.shape, x_TNH.dtype)],
        grid=(-(-T * N // rows),),
        constants={
            "NUM_ROWS": T * N,
            "N": N,
            "H": H,
            "HP": padded,
            "PAIRS": pairs,
            "PP": 1 << (pairs - 1).bit_length(),
            "ROWS": rows,
            "EPS": float(eps),
        },
        schedule=Schedule(num_warps=4, num_stages=1),
    )[0]
