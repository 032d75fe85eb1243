"""`rotate_and_write`: what happens to a step's queries, keys and values between their projection
and attention.
"""

import jax
from jax.typing import DTypeLike

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.rotate_and_write import reference, triton_gpu

_rotate_and_write = first_of(triton_gpu.rotate_and_write, reference.rotate_and_write)


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
    """Return (queries [T, N, H], pages): queries and keys normalised head by head (where the norms'
    scales are given) and rotated; keys and values stored as `kv_write` does, pages consumed as
    there.

    `qkv` holds N heads of queries, K of keys, K of values, as summands: one, or several in float32,
    which are added up in their order. `cos` and `sin` are float32 and rotate the pairs (i, i + R)
    of every head; dimensions from 2 R on pass through. Each stage, the sum included, rounds to
    `dtype`, which is the queries'. Queries at or past `num_tokens` are finite if `qkv` is,
    otherwise unspecified.
    """
    return _rotate_and_write(
        qkv_PTXH,
        cos_TR,
        sin_TR,
        kv_pages_PB2KH,
        slots_T,
        num_tokens,
        dtype=dtype,
        q_norm_H=q_norm_H,
        k_norm_H=k_norm_H,
        eps=eps,
    )
