"""Products with few rows on NVIDIA GPUs (`triton_kernels.py`), gate and up joined where they are.

On an H100 the four products of a Llama 8B layer take 174 us at 1 row so, launches included, against
180 of XLA's (`docs/benchmarks.md`). The depth is summed in one chain, as cuBLASLt sums it for many
rows: Hopper's matrix unit gives the same bits then, whatever the instruction and the tile.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jengine.pallas_kernels.packed import Weight, kernel_arrays, kernel_codes
from jengine.pallas_kernels.platform import is_hopper
from jengine.pallas_kernels.triton_call import Schedule, triton_call

MAX_ROWS = 64  # with more, cuBLASLt is faster
MAX_GATED_ROWS = 128
MAX_HEAD_ROWS = 128
MIN_HEAD_OUTPUTS = 49_152
FEW_OUTPUTS = 6144  # fewer: too few tiles of 64 to keep the memory busy
DEEP = 8192


@dataclass(frozen=True, slots=True)
class Tiling:
    """Columns (tokens), depth and rows (outputs) of a tile, and how its kernel is compiled."""

    tokens: int
    depth: int
    schedule: Schedule
    outputs: int = 64


def tiling(rows: int, outputs: int, depth: int) -> Tiling:
    """The best of about ten for each of Llama-3.1-8B's and Qwen3-0.6B's products at 1, 32 and 64
    rows: what keeps 100 to 200 KiB of weights in flight on each multiprocessor.
    """
    tokens = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if depth % 128:
        return Tiling(tokens, 64, Schedule(4, 5))
    if tokens == 64 or outputs >= FEW_OUTPUTS or depth % 256:
        return Tiling(tokens, 128, Schedule(4, 5 if tokens == 32 else 6))
    if tokens == 32:
        return Tiling(32, 256, Schedule(4, 4), outputs=16)
    if depth > DEEP and depth % 512 == 0:
        return Tiling(16, 512, Schedule(4, 4), outputs=16)
    return Tiling(16, 256, Schedule(2, 6), outputs=16)


def gated_tiling(rows: int, depth: int) -> Tiling:
    """Two tiles of weights at a time."""
    if rows > 32 or depth % 128:
        tokens = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
        return Tiling(tokens, 64, Schedule(4, 5))
    return Tiling(16 if rows <= 16 else 32, 128, Schedule(4, 4))


def head_tiling(rows: int, depth: int) -> Tiling:
    """128 rows times a head of 128,256 take 421 us (XLA: 420); in tiles of 64 outputs 474."""
    return gated_tiling(rows, depth) if rows <= 64 else Tiling(128, 64, Schedule(8, 3), outputs=128)


def linear(
    x_TD: jax.Array,
    w_FD: jax.Array,
    bias_F: jax.Array | None = None,
    *,
    num_tokens: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Output heads, of so many outputs, for more rows than others: XLA tunes its own kernels on
    copies of their operands, which for a head are a gigabyte.
    """
    del num_tokens  # padding rows are computed like the rest
    (T, D), F = x_TD.shape, w_FD.shape[0]
    is_head = F >= MIN_HEAD_OUTPUTS
    _require_few_rows(x_TD, w_FD, MAX_HEAD_ROWS if is_head else MAX_ROWS)
    if T > 32 and D > DEEP and not is_head:
        raise NotImplementedError(f"{T} rows of {D}: cuBLASLt is faster")
    tile = head_tiling(T, D) if is_head else tiling(T, F, D)
    out_dtype = x_TD.dtype if out_dtype is None else jnp.dtype(out_dtype)
    if bias_F is None:
        return multiply(x_TD, w_FD, F, tile, gated=False, out_dtype=out_dtype)
    y_TF = multiply(x_TD, w_FD, F, tile, gated=False, out_dtype=jnp.dtype(jnp.float32))
    return (y_TF + bias_F.astype(jnp.float32)[None, :]).astype(out_dtype)


def silu_linear(
    x_TD: jax.Array, w_F2D: jax.Array, *, num_tokens: jax.Array | None = None
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    _require_few_rows(x_TD, w_F2D, MAX_GATED_ROWS)
    F = w_F2D.shape[0] // 2
    tile = gated_tiling(*x_TD.shape)
    return multiply(x_TD, w_F2D, F, tile, gated=True, out_dtype=x_TD.dtype)


def _require_few_rows(x_TD: jax.Array, w_FD: jax.Array, max_rows: int) -> None:
    if x_TD.dtype != jnp.bfloat16 or w_FD.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{x_TD.dtype} times {w_FD.dtype}")
    if x_TD.shape[0] > max_rows or x_TD.shape[1] % 64:
        raise NotImplementedError(f"rows {x_TD.shape}: at most {max_rows}, of a multiple of 64")
    if not is_hopper():
        raise NotImplementedError("tuned for Hopper")


def multiply(
    x_TX: jax.Array,
    w_FD: Weight,
    outputs: int,
    tile: Tiling,
    *,
    gated: bool,
    out_dtype: DTypeLike,
    heads: int = 1,
) -> jax.Array:
    """[T, outputs] in `out_dtype`. With `heads` the outputs are those of so many, one after
    another, and so are the inputs.
    """
    from jengine.pallas_kernels.linear.triton_kernels import multiply_rows

    T, D = x_TX.shape[0], w_FD.shape[1]
    return triton_call(
        multiply_rows,
        (x_TX, *kernel_arrays(w_FD)),
        [jax.ShapeDtypeStruct((T, outputs), out_dtype)],
        grid=(-(-outputs // tile.outputs) * -(-T // tile.tokens),),
        constants={
            "T": T,
            "F": outputs,
            "D": D,
            "BF": tile.outputs,
            "BT": tile.tokens,
            "BK": tile.depth,
            "GATED": gated,
            "HEADS": heads,
            "STAGES": tile.schedule.num_stages,
            "CODES": kernel_codes(w_FD),
        },
        schedule=tile.schedule,
    )[0]
