"""`silu_mul` on NVIDIA GPUs where a row's bits must not depend on its batch: products of few rows
end with it (`linear.triton_gpu.silu_linear`), with other bits than XLA's.
"""

import jax

from jengine.pallas_kernels.platform import is_batch_invariant, require_cuda
from jengine.pallas_kernels.triton_call import Schedule, triton_call

WIDTH = 2048  # of a program


def silu_mul(gate_up_TF2: jax.Array, *, num_tokens: jax.Array | None = None) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    if not is_batch_invariant():
        raise NotImplementedError("XLA does as well")
    require_cuda()
    from jengine.pallas_kernels.silu_mul.triton_kernels import silu_mul_row

    T, F = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    return triton_call(
        silu_mul_row,
        (gate_up_TF2,),
        [jax.ShapeDtypeStruct((T, F), gate_up_TF2.dtype)],
        grid=(T, -(-F // WIDTH)),
        constants={"F": F, "WIDTH": WIDTH},
        schedule=Schedule(num_warps=4, num_stages=1),
    )[0]
