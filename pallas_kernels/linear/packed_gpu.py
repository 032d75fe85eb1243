"""Products of few rows with a packed weight on NVIDIA GPUs: its codes become bfloat16 in registers,
on their way to the matrix unit (`triton_kernels.py`).

More rows are left to a temporary in bfloat16 and XLA's products: unpacking moves five bytes for
one of the weight, which the product's own time exceeds from some hundred rows on, and cuBLASLt's
kernels for many rows are better than ours.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jengine.pallas_kernels.linear.reference import sum_of_parts
from jengine.pallas_kernels.linear.triton_gpu import (
    TILE_OUTPUTS,
    Tiling,
    multiply,
    split_count,
)
from jengine.pallas_kernels.packed import PackedWeight
from jengine.pallas_kernels.platform import is_hopper
from jengine.pallas_kernels.triton_call import Schedule

MAX_ROWS = 128
DEPTH = 128  # of a tile: a group of e4m3, four of e2m1


def tiling(rows: int) -> Tiling:
    """Half or a quarter of the bytes of `triton_gpu.tiling`, so more programs share a
    multiprocessor."""
    if rows <= 32:
        return Tiling(16 if rows <= 16 else 32, DEPTH, Schedule(4, 4))
    return Tiling(64 if rows <= 64 else 128, DEPTH, Schedule(4, 3))


def linear(
    x_TD: jax.Array,
    w_FD: PackedWeight,
    bias_F: jax.Array | None = None,
    *,
    num_tokens: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    if bias_F is not None:
        raise NotImplementedError("a bias")
    parts_PTF = linear_parts(x_TD, w_FD, num_tokens=num_tokens, out_dtype=out_dtype)
    return sum_of_parts(parts_PTF, x_TD.dtype if out_dtype is None else out_dtype)


def linear_parts(
    x_TD: jax.Array,
    w_FD: PackedWeight,
    *,
    num_tokens: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """`out_dtype`: of a single summand."""
    del num_tokens  # padding rows are computed like the rest
    F, D = w_FD.shape
    _require(x_TD, w_FD)
    splits = split_count(F, D, DEPTH)
    return multiply(x_TD, w_FD, F, tiling(x_TD.shape[0]), splits, gated=False, out_dtype=out_dtype)


def silu_linear(
    x_TD: jax.Array, w_F2D: PackedWeight, *, num_tokens: jax.Array | None = None
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    _require(x_TD, w_F2D)
    return multiply(x_TD, w_F2D, w_F2D.shape[0] // 2, tiling(x_TD.shape[0]), 1, gated=True)[0]


def linear_heads(x_TNH: jax.Array, w_NFH: PackedWeight, *, num_tokens: jax.Array) -> jax.Array:
    """Heads are rows of one weight that read other inputs."""
    del num_tokens  # padding rows are computed like the rest
    (T, N, H), F = x_TNH.shape, w_NFH.shape[1]
    _require(x_TNH, w_NFH)
    if F % TILE_OUTPUTS:
        raise NotImplementedError(f"heads of {F} outputs: a tile would span two")
    rows = PackedWeight(
        w_NFH.codes.reshape(N * F, -1), w_NFH.scales.reshape(N * F, -1), w_NFH.packing
    )
    splits = split_count(N * F, H, DEPTH)
    parts_PTX = multiply(
        x_TNH.reshape(T, N * H), rows, N * F, tiling(T), splits, gated=False, heads=N
    )
    return sum_of_parts(parts_PTX, x_TNH.dtype).reshape(T, N, F)


def _require(x: jax.Array, weight: PackedWeight) -> None:
    depth = weight.shape[-1]
    if weight.codes.size >= 1 << 31:
        raise NotImplementedError(f"a weight of {weight.codes.size} bytes")
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"activations in {x.dtype}")
    if x.shape[0] > MAX_ROWS or depth % DEPTH:
        raise NotImplementedError(
            f"rows {x.shape}: at most {MAX_ROWS}, of depths that are multiples of {DEPTH}"
        )
    if not is_hopper():
        raise NotImplementedError("tuned for Hopper")
