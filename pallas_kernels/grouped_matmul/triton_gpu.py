"""Routed experts on NVIDIA GPUs: pairs of token and expert ordered by counting, then two grouped
products over tiles of one expert each (`triton_kernels.py`). Grids are worst cases; programs past
the tiles in use end at once. No atomics: results do not depend on which program runs first.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.grouped_matmul.activation import ClampedSwiGLU
from jengine.pallas_kernels.packed import PackedWeight, Weight, kernel_arrays, kernel_codes
from jengine.pallas_kernels.platform import is_batch_invariant, require_cuda
from jengine.pallas_kernels.triton_call import Schedule, triton_call

DTYPES = ("bfloat16", "float16", "float32")
FEW_TOKENS = 256  # up to here summands stay float32, if bits may depend on the batch
COUNTED = 2048  # pairs that a planning program takes at once
FEW_PAIRS = 32  # with these, smaller tiles are needed to reach every multiprocessor
UNIT = 64  # depths are multiples of it


@dataclass(frozen=True, slots=True)
class Tiling:
    """Pairs, outputs and depth of a tile, and how its kernel is compiled."""

    rows: int
    outputs: int
    depth: int
    schedule: Schedule


def tile_rows(num_tokens: int, top_k: int, num_experts: int) -> int:
    """Four times an expert's mean share: routers are not even, and an expert that needs a second
    tile costs its weights twice; padding in a tile costs little while weights are what takes time.
    """
    share = max(1, 4 * num_tokens * top_k // num_experts)
    return min(max(16, 1 << (share - 1).bit_length()), 128)


def gate_up_tiling(rows: int, num_pairs: int, depth: int, itemsize: int) -> Tiling:
    if itemsize == 4:
        return Tiling(rows, 32, 32, Schedule(4, 2))
    if num_pairs <= FEW_PAIRS and depth % 128 == 0:
        return Tiling(rows, 32, 128, Schedule(4, 4))
    if rows >= 128:
        return Tiling(rows, 128, 64, Schedule(8, 4))
    if rows > 32 or depth % 128:
        return Tiling(rows, 64, 64, Schedule(4, 4))
    return Tiling(rows, 64, 128, Schedule(4, 3))


def down_tiling(rows: int, num_pairs: int, depth: int, itemsize: int) -> Tiling:
    if itemsize == 4:
        return Tiling(rows, 32, 32, Schedule(4, 2))
    if num_pairs <= FEW_PAIRS and depth % 128 == 0:
        return Tiling(rows, 32, 128, Schedule(4, 4))
    if rows >= 128:
        return Tiling(rows, 128, 64, Schedule(4, 4))
    if rows > 32 or depth % 128:
        return Tiling(rows, 64, 64, Schedule(4, 5))
    return Tiling(rows, 64, 128, Schedule(4, 4))


def packed_tiling(rows: int) -> Tiling:
    """Of packed weights: 64 outputs or more are rows of the warpgroup's matrix unit, which takes
    what was unpacked from registers. Fewer would be unpacked by several warps each.
    """
    if rows >= 128:
        return Tiling(rows, 128, 128, Schedule(8, 3))
    return Tiling(rows, 64, 128, Schedule(4, 4 if rows <= 32 else 3))


def require_takeable(weight: Weight, dtype: jnp.dtype) -> None:
    """Refuse (see `dispatch.py`) what the kernels do not multiply `dtype` by."""
    if not isinstance(weight, PackedWeight):
        if dtype not in DTYPES or weight.dtype != dtype:
            raise NotImplementedError(f"{dtype} times {weight.dtype}")
    elif dtype != jnp.bfloat16:
        raise NotImplementedError(f"packed weights become bfloat16, not {dtype}")
    elif weight.shape[-1] % weight.packing.group:
        raise NotImplementedError(f"{weight.shape[-1]} inputs end inside a group")


def expert_parts(
    x_TD: jax.Array,
    expert_ids_Tk: jax.Array,
    weights_Tk: jax.Array,
    gate_up_EFD: Weight,
    down_EDF: Weight,
    *,
    num_tokens: jax.Array,
    gate_up_bias_EF: jax.Array | None = None,
    down_bias_ED: jax.Array | None = None,
    activation: ClampedSwiGLU | None = None,
    num_experts: int | None = None,
) -> jax.Array:
    (T, D), k, (E, _, F) = x_TD.shape, expert_ids_Tk.shape[1], down_EDF.shape
    dtype = x_TD.dtype
    for weight in (gate_up_EFD, down_EDF):
        require_takeable(weight, dtype)
    if D % UNIT or F % UNIT:
        raise NotImplementedError(f"widths {D}, {F}: must be multiples of {UNIT}")
    require_cuda()
    from jengine.pallas_kernels.grouped_matmul.triton_kernels import (
        down_of_experts,
        gate_up_of_experts,
    )

    rows = tile_rows(T, k, num_experts or E)
    order_M, tiles_G3, num_tiles = _plan(expert_ids_Tk, num_tokens, E, rows)
    G = tiles_G3.shape[0]
    precision = "ieee"  # float32 means float32: not TF32, which is Triton's default
    codes = kernel_codes(gate_up_EFD)
    tile = packed_tiling(rows) if codes else gate_up_tiling(rows, T * k, D, dtype.itemsize)
    (h_MF,) = triton_call(
        gate_up_of_experts,
        (
            x_TD,
            *kernel_arrays(gate_up_EFD),
            x_TD if gate_up_bias_EF is None else gate_up_bias_EF,
            order_M,
            tiles_G3,
            num_tiles,
        ),
        [jax.ShapeDtypeStruct((T * k, F), dtype)],
        grid=(G * -(-F // tile.outputs),),
        constants={
            "D": D, "F": F, "TOP_K": k, "BF": tile.outputs, "ROWS": rows, "BK": tile.depth,
            "STAGES": tile.schedule.num_stages, "CODES": codes,
            "HAS_BIAS": gate_up_bias_EF is not None,
            "ALPHA": 0.0 if activation is None else float(activation.alpha),
            "LIMIT": 0.0 if activation is None else float(activation.limit),
            "UP_OFFSET": 0.0 if activation is None else float(activation.up_offset),
            "PRECISION": precision,
        },
        schedule=tile.schedule,
    )  # fmt: skip
    is_wide = k > 1 and T <= FEW_TOKENS and not is_batch_invariant()
    codes = kernel_codes(down_EDF)
    tile = packed_tiling(rows) if codes else down_tiling(rows, T * k, F, dtype.itemsize)
    (parts_kTD,) = triton_call(
        down_of_experts,
        (
            h_MF,
            *kernel_arrays(down_EDF),
            x_TD if down_bias_ED is None else down_bias_ED,
            weights_Tk.astype(jnp.float32),
            order_M,
            tiles_G3,
            num_tiles,
        ),
        [jax.ShapeDtypeStruct((k, T, D), jnp.float32 if is_wide else dtype)],
        grid=(G * -(-D // tile.outputs),),
        constants={
            "T": T, "D": D, "F": F, "TOP_K": k, "BF": tile.outputs, "ROWS": rows,
            "BK": tile.depth, "STAGES": tile.schedule.num_stages, "CODES": codes,
            "HAS_BIAS": down_bias_ED is not None, "PRECISION": precision,
        },
        schedule=tile.schedule,
    )  # fmt: skip
    if num_experts is None:
        return parts_kTD
    is_ours_kT = (expert_ids_Tk < E).T  # nobody has written the others
    return jnp.where(is_ours_kT[:, :, None], parts_kTD, 0)


def _plan(
    expert_ids_Tk: jax.Array, num_tokens: jax.Array, num_experts: int, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(order i32[M], tiles i32[G, 3], i32[1]: how many of them are in use)."""
    from jengine.pallas_kernels.grouped_matmul.triton_kernels import plan_experts

    (T, k), E = expert_ids_Tk.shape, num_experts
    M = T * k
    # A touched expert wastes less than one tile, and there are at most E and at most M of them.
    G = min(E, M) + M // rows
    order_M, tiles_G3, num_tiles = triton_call(
        plan_experts,
        (expert_ids_Tk, jnp.asarray(num_tokens, jnp.int32).reshape(1)),
        [
            jax.ShapeDtypeStruct((M,), jnp.int32),
            jax.ShapeDtypeStruct((G, 3), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ],
        grid=(E,),
        constants={
            "M": M,
            "TOP_K": k,
            "E": E,
            "EP": 1 << E.bit_length(),
            "ROWS": rows,
            "TILES": 1 << (-(-T // rows) - 1).bit_length(),
            "CHUNK": min(COUNTED, max(32, 1 << (M - 1).bit_length())),
        },
        schedule=Schedule(num_warps=4, num_stages=1),
    )
    return order_M, tiles_G3, num_tiles
