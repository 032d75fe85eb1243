"""`rms_norm` of a few rows on NVIDIA GPUs (`triton_kernels.py`): of so few XLA makes two kernels,
1.3 and 1.4 us each; for more it makes one, as fast as this.
"""

import jax

from jengine.pallas_kernels.platform import require_cuda
from jengine.pallas_kernels.triton_call import Schedule, triton_call

DTYPES = ("bfloat16", "float16", "float32")
MAX_ROWS = 8


def rms_norm(
    x_TD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    num_tokens: jax.Array | None = None,
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    T, D = x_TD.shape
    if x_TD.dtype not in DTYPES or weight_D.dtype not in DTYPES:
        raise NotImplementedError(f"{x_TD.dtype} rows")
    if T > MAX_ROWS:
        raise NotImplementedError(f"{T} rows")
    require_cuda()
    from jengine.pallas_kernels.rms_norm.triton_kernels import norm_row

    return triton_call(
        norm_row,
        (x_TD, weight_D),
        [jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)],
        grid=(T,),
        constants={"D": D, "DP": 1 << (D - 1).bit_length(), "EPS": eps},
        schedule=Schedule(num_warps=8, num_stages=1),
    )[0]
