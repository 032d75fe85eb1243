"""Products of few rows with a packed weight on NVIDIA GPUs: its codes become bfloat16 in registers,
on their way to the matrix unit (`triton_kernels.py`).

More rows are left to a temporary in bfloat16 and XLA's products: unpacking moves five bytes for
one of the weight, which the product's own time exceeds from some hundred rows on, and cuBLASLt's
kernels for many rows are better than ours.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jengine.pallas_kernels.linear.triton_gpu import Tiling, multiply
from jengine.pallas_kernels.packed import PackedWeight
from jengine.pallas_kernels.platform import is_hopper
from jengine.pallas_kernels.triton_call import Schedule

MAX_ROWS = 128
NUM_MULTIPROCESSORS = 132
DEPTH = 128  # of a tile: a group of e4m3, four of e2m1


def tiling(rows: int, outputs: int) -> Tiling:
    """64 outputs always: what is unpacked goes into the warpgroup's product from registers. Half or
    a quarter of the bytes of `triton_gpu.tiling`, so more programs share a multiprocessor; or one
    has it alone and must read far ahead.
    """
    is_alone = outputs <= 64 * NUM_MULTIPROCESSORS
    if rows <= 32:
        return Tiling(16 if rows <= 16 else 32, DEPTH, Schedule(4, 8 if is_alone else 4))
    return Tiling(64 if rows <= 64 else 128, DEPTH, Schedule(4, 4 if is_alone else 3))


def linear(
    x_TD: jax.Array,
    w_FD: PackedWeight,
    bias_F: jax.Array | None = None,
    *,
    num_tokens: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    if bias_F is not None:
        raise NotImplementedError("a bias")
    _require(x_TD, w_FD)
    F = w_FD.shape[0]
    out_dtype = x_TD.dtype if out_dtype is None else out_dtype
    return multiply(x_TD, w_FD, F, tiling(x_TD.shape[0], F), gated=False, out_dtype=out_dtype)


def silu_linear(
    x_TD: jax.Array, w_F2D: PackedWeight, *, num_tokens: jax.Array | None = None
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    _require(x_TD, w_F2D)
    F = w_F2D.shape[0] // 2
    tile = tiling(x_TD.shape[0], F)
    return multiply(x_TD, w_F2D, F, tile, gated=True, out_dtype=x_TD.dtype)


def linear_heads(x_TNH: jax.Array, w_NFH: PackedWeight, *, num_tokens: jax.Array) -> jax.Array:
    """Heads are rows of one weight that read other inputs."""
    del num_tokens  # padding rows are computed like the rest
    (T, N, H), F = x_TNH.shape, w_NFH.shape[1]
    _require(x_TNH, w_NFH)
    tile = tiling(T, N * F)
    if F % tile.outputs:
        raise NotImplementedError(f"heads of {F} outputs: a tile would span two")
    rows = PackedWeight(
        w_NFH.codes.reshape(N * F, -1), w_NFH.scales.reshape(N * F, -1), w_NFH.packing
    )
    x_TX = x_TNH.reshape(T, N * H)
    out_TX = multiply(x_TX, rows, N * F, tile, gated=False, out_dtype=x_TX.dtype, heads=N)
    return out_TX.reshape(T, N, F)


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
