"""Attention over chosen entries on NVIDIA GPUs (`triton_kernels.py`), of one cache or two.

A token's slots are split where there are too few tokens to fill the device. Into how many parts
depends on T, as in `ragged_paged_attention`, and on the token's own number of slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.platform import require_cuda
from jengine.pallas_kernels.ragged_paged_attention.triton_gpu import programs_at_once
from jengine.pallas_kernels.triton_call import Schedule, triton_call

DTYPES = ("bfloat16", "float16", "float32")
MAX_VALUE_DIM, MAX_REST = 512, 64
MAX_SPLITS = 64  # of a token's slots
MIN_BLOCKS = 2  # of a split
CHUNK = 8  # splits that are added up at once


@dataclass(frozen=True, slots=True)
class Tiling:
    """Heads of a program, slots of a block, and compilation."""

    heads: int
    block: int
    schedule: Schedule


def tiling(num_heads: int, itemsize: int) -> Tiling:
    """All heads share what they read: a program has as many as its registers hold."""
    if itemsize == 4:
        return Tiling(16, 16, Schedule(4, 2))
    if num_heads <= 16:
        return Tiling(16, 32, Schedule(4, 3))
    if num_heads <= 32:
        return Tiling(32, 32, Schedule(8, 3))
    return Tiling(64, 32, Schedule(8, 3))


def num_splits(num_items: int, num_blocks: int) -> int:
    """`num_items` programs without splits, of at most so many blocks each."""
    return max(1, min(programs_at_once(1) // num_items, num_blocks // MIN_BLOCKS, MAX_SPLITS))


def joint_attention(
    q_TNE: jax.Array,
    caches: Sequence[tuple[jax.Array, jax.Array]],
    sinks_N: jax.Array,
    num_tokens: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    return attend(q_TNE, caches, sinks_N, num_tokens, value_dim=q_TNE.shape[2], scale=scale)


def attend(
    q_TNE: jax.Array,
    caches: Sequence[tuple[jax.Array, jax.Array]],
    sinks_N: jax.Array | None,
    num_tokens: jax.Array,
    *,
    value_dim: int,
    scale: float,
) -> jax.Array:
    """[T, N, value_dim]. A value is the first part of its key."""
    (T, N, _), E, R = q_TNE.shape, value_dim, q_TNE.shape[2] - value_dim
    dtypes = {q_TNE.dtype, *(pages.dtype for pages, _ in caches)}
    if not all(dtype in DTYPES for dtype in dtypes):
        raise NotImplementedError(f"queries and pages of {dtypes}")
    if E > MAX_VALUE_DIM or R > MAX_REST or E % 8 or R % 8 or not 1 <= len(caches) <= 2:
        raise NotImplementedError(f"{len(caches)} caches, entries of {E} and {R}")
    require_cuda()
    from jengine.pallas_kernels.joint_attention.triton_kernels import attend_token

    is_wide = len(dtypes) > 1 or q_TNE.dtype == jnp.float32
    tile = tiling(N, 4 if is_wide else q_TNE.dtype.itemsize)
    (pages, slots), (more_pages, more_slots) = caches[0], caches[-1]
    widths = slots.shape[1], more_slots.shape[1] if len(caches) == 2 else 0
    programs = T * -(-N // tile.heads)
    splits = num_splits(programs, sum(-(-width // tile.block) for width in widths))
    is_real_T = jnp.arange(T, dtype=jnp.int32) < num_tokens
    counts_T, more_counts_T = (
        jnp.sum((x >= 0) & is_real_T[:, None], axis=1, dtype=jnp.int32) for x in (slots, more_slots)
    )
    sinks = counts_T if sinks_N is None else sinks_N.astype(jnp.float32)
    sizes = {
        "N": N,
        "E": E,
        "EP": max(16, 1 << (E - 1).bit_length()),
        "SPLITS": splits,
        "HAS_SINKS": sinks_N is not None,
    }
    # With one split nobody writes the parts, with several nobody the result: they need no room.
    parts = T * splits if splits > 1 else 1
    out_TNE, acc, top, total = triton_call(
        attend_token,
        (q_TNE, pages, slots, counts_T, more_pages, more_slots, more_counts_T, sinks),
        [
            jax.ShapeDtypeStruct((T if splits == 1 else 1, N, E), q_TNE.dtype),
            jax.ShapeDtypeStruct((parts, N, E), jnp.float32),
            jax.ShapeDtypeStruct((parts, N), jnp.float32),
            jax.ShapeDtypeStruct((parts, N), jnp.float32),
        ],
        grid=(programs, splits),
        constants=sizes
        | {
            "R": R,
            "RP": max(16, 1 << (R - 1).bit_length()) if R else 16,
            "HEADS": tile.heads,
            "FIRST_ROW": pages.shape[2],
            "FIRST_WIDTH": widths[0],
            "SECOND_ROW": more_pages.shape[2],
            "SECOND_WIDTH": widths[1],
            "BLOCK": tile.block,
            "MIN_BLOCKS": MIN_BLOCKS,
            "SCALE": float(scale),
            "PRECISION": "ieee",  # float32 means float32: not TF32, which is Triton's default
            "WIDE": is_wide,
        },
        schedule=tile.schedule,
    )
    return out_TNE if splits == 1 else _add_up(acc, top, total, sinks, q_TNE, sizes)


def _add_up(
    acc: jax.Array,
    top: jax.Array,
    total: jax.Array,
    sinks: jax.Array,
    q_TNE: jax.Array,
    sizes: dict[str, int | bool],
) -> jax.Array:
    from jengine.pallas_kernels.joint_attention.triton_kernels import add_up_splits

    T, N, _ = q_TNE.shape
    return triton_call(
        add_up_splits,
        (acc, top, total, sinks),
        [jax.ShapeDtypeStruct((T, N, sizes["E"]), q_TNE.dtype)],
        grid=(T, N),
        constants=sizes | {"SPLITS_P": 1 << (sizes["SPLITS"] - 1).bit_length(), "CHUNK": CHUNK},
        schedule=Schedule(4, 1),
    )[0]
