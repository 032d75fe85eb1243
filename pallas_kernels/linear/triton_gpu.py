"""Products with few rows on NVIDIA GPUs (`triton_kernels.py`), which end where the next kernel can
go on: as summands of split depth, or with gate and up joined.

On an H100 the four products of a Llama 8B layer take 166 us at 1 row so, against 176 of XLA's with
the kernels that they save (`docs/benchmarks.md`).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jengine.pallas_kernels.packed import Weight, kernel_arrays, kernel_codes
from jengine.pallas_kernels.platform import is_hopper
from jengine.pallas_kernels.triton_call import Schedule, triton_call

MAX_PARTS_ROWS = 64  # with more, cuBLASLt's own splitting is faster
MAX_GATED_ROWS = 128
MAX_HEAD_ROWS = 128
MIN_DEPTH = 512  # of a split
MIN_PROGRAMS = 192  # one and a half for each multiprocessor
TILE_OUTPUTS = 64
MIN_HEAD_OUTPUTS = 4 * MIN_PROGRAMS * TILE_OUTPUTS


@dataclass(frozen=True, slots=True)
class Tiling:
    """Columns (tokens), depth and rows (outputs) of a tile, and how its kernel is compiled."""

    tokens: int
    depth: int
    schedule: Schedule
    outputs: int = TILE_OUTPUTS


def tiling(rows: int, depth: int) -> Tiling:
    """Keeps 50 to 100 KiB of weights in flight on each multiprocessor."""
    if rows > 32 or depth % 128:
        tokens = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
        return Tiling(tokens, 64, Schedule(4, 5))
    return Tiling(16 if rows <= 16 else 32, 128, Schedule(4, 4))


def head_tiling(rows: int, depth: int) -> Tiling:
    """128 rows times a head of 128,256 take 421 us (XLA: 420); in tiles of 64 outputs 474."""
    return tiling(rows, depth) if rows <= 64 else Tiling(128, 64, Schedule(8, 3), outputs=128)


def split_count(outputs: int, depth: int, tile_depth: int) -> int:
    """Fewest equal splits of the depth that give every multiprocessor something to do."""
    blocks = depth // tile_depth
    tiles = -(-outputs // TILE_OUTPUTS)
    best = 1
    for splits in range(1, 9):
        if blocks % splits or (splits > 1 and depth // splits < MIN_DEPTH):
            continue
        best = splits
        if tiles * splits >= MIN_PROGRAMS:
            break
    return best


def linear(
    x_TD: jax.Array,
    w_FD: jax.Array,
    bias_F: jax.Array | None = None,
    *,
    num_tokens: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Of so many outputs that their tiles alone fill the device: an output head. XLA tunes its own
    kernels on copies of their operands, which for a head are a gigabyte.
    """
    del num_tokens  # padding rows are computed like the rest
    F = w_FD.shape[0]
    if bias_F is not None or F < MIN_HEAD_OUTPUTS:
        raise NotImplementedError(f"{F} outputs")
    _require_few_rows(x_TD, w_FD, MAX_HEAD_ROWS)
    tile = head_tiling(*x_TD.shape)
    return multiply(x_TD, w_FD, F, tile, 1, gated=False, out_dtype=out_dtype)[0]


def linear_parts(
    x_TD: jax.Array, w_FD: jax.Array, *, num_tokens: jax.Array | None = None
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    (T, D), F = x_TD.shape, w_FD.shape[0]
    _require_few_rows(x_TD, w_FD, MAX_PARTS_ROWS)
    tile = tiling(T, D)
    return multiply(x_TD, w_FD, F, tile, split_count(F, D, tile.depth), gated=False)


def silu_linear(
    x_TD: jax.Array, w_F2D: jax.Array, *, num_tokens: jax.Array | None = None
) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    _require_few_rows(x_TD, w_F2D, MAX_GATED_ROWS)
    F = w_F2D.shape[0] // 2
    return multiply(x_TD, w_F2D, F, tiling(*x_TD.shape), 1, gated=True)[0]


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
    splits: int,
    *,
    gated: bool,
    heads: int = 1,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """[splits, T, outputs]: summands in float32, or the result in `out_dtype` (that of `x`). With
    `heads` the outputs are those of so many, one after another, and so are the inputs.
    """
    from jengine.pallas_kernels.linear.triton_kernels import multiply_rows

    T, D = x_TX.shape[0], w_FD.shape[1]
    dtype = jnp.float32 if splits > 1 else out_dtype or x_TX.dtype
    return triton_call(
        multiply_rows,
        (x_TX, *kernel_arrays(w_FD)),
        [jax.ShapeDtypeStruct((splits, T, outputs), dtype)],
        grid=(-(-outputs // tile.outputs) * splits * -(-T // tile.tokens),),
        constants={
            "T": T,
            "F": outputs,
            "D": D,
            "BF": tile.outputs,
            "BT": tile.tokens,
            "BK": tile.depth,
            "SPLITS": splits,
            "GATED": gated,
            "HEADS": heads,
            "STAGES": tile.schedule.num_stages,
            "CODES": kernel_codes(w_FD),
        },
        schedule=tile.schedule,
    )[0]
