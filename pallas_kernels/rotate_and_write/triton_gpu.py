"""`rotate_and_write` on NVIDIA GPUs: one kernel (`triton_kernels.py`), where XLA needs two, and
four with norms. In a decode step each costs its launch, 1 to 2 us.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jengine.pallas_kernels.platform import require_cuda
from jengine.pallas_kernels.triton_call import Schedule, triton_call

DTYPES = ("bfloat16", "float16", "float32")
HEADS = 8  # of one program


def rotate_and_write(
    qkv_PTXH: jax.Array,
    cos_TR: jax.Array,
    sin_TR: jax.Array,
    kv_pages_PB2KH: jax.Array,
    slots_T: jax.Array,
    num_tokens: jax.Array,
    *,
    dtype: DTypeLike,
    q_norm_H: jax.Array | None = None,
    k_norm_H: jax.Array | None = None,
    eps: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    P, T, X, H = qkv_PTXH.shape
    pages, dtype = kv_pages_PB2KH, jnp.dtype(dtype)
    if dtype not in DTYPES or pages.dtype not in DTYPES:
        raise NotImplementedError(f"{dtype} heads, {pages.dtype} pages")
    require_cuda()
    from jengine.pallas_kernels.rotate_and_write.triton_kernels import rotate_heads

    K = pages.shape[3]
    N = X - 2 * K
    norms = None if q_norm_H is None or k_norm_H is None else (q_norm_H, k_norm_H)
    q_TNH, pages = triton_call(
        rotate_heads,
        (
            qkv_PTXH,
            cos_TR,
            sin_TR,
            *(norms or (cos_TR, sin_TR)),
            slots_T,
            jnp.asarray(num_tokens, jnp.int32).reshape(1),
            pages,
        ),
        [
            jax.ShapeDtypeStruct((T, N, H), dtype),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        ],
        grid=(T, -(-X // HEADS)),
        constants={
            "T": T,
            "P": P,
            "N": N,
            "K": K,
            "H": H,
            "HP": 1 << (H - 1).bit_length(),
            "HALF": cos_TR.shape[1],
            "HEADS": HEADS,
            "HAS_NORMS": norms is not None,
            "EPS": float(eps),
        },
        schedule=Schedule(num_warps=4, num_stages=1),
        aliases={7: 1},
    )
    return q_TNH, pages
