"""`log_softmax_rows` on NVIDIA GPUs: XLA sums few rows in another order than many."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.platform import is_batch_invariant, require_cuda
from jengine.pallas_kernels.triton_call import Schedule, triton_call

BLOCK = 4096


def log_softmax_rows(x_SV: jax.Array) -> jax.Array:
    if x_SV.dtype != jnp.float32 or not is_batch_invariant():
        raise NotImplementedError(f"{x_SV.dtype} logits")
    require_cuda()
    from jengine.pallas_kernels.log_softmax_rows.triton_kernels import sum_of_row

    S, V = x_SV.shape
    one = jax.ShapeDtypeStruct((S, 1), jnp.float32)
    top_S1, total_S1 = triton_call(
        sum_of_row,
        (x_SV,),
        [one, one],
        grid=(S,),
        constants={"V": V, "BLOCK": BLOCK},
        schedule=Schedule(num_warps=8, num_stages=3),
    )
    return (x_SV - top_S1) - jnp.log(total_S1)
