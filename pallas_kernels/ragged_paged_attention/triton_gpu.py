"""Ragged paged attention on NVIDIA GPUs (`triton_kernels.py`)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.platform import is_batch_invariant, require_cuda
from jengine.pallas_kernels.ragged_paged_attention import mosaic_gpu
from jengine.pallas_kernels.ragged_paged_attention.work import (
    DOUBLINGS,
    MAX_CHUNKS,
    MIN_CHUNK,
    Chunks,
    Tiles,
    plan_chunks,
    plan_full_tiles,
    plan_tiles,
)
from jengine.pallas_kernels.triton_call import Schedule, triton_call

DTYPES = ("bfloat16", "float16", "float32")
MAX_HEAD_DIM = 512
NUM_MULTIPROCESSORS = 132
LONG_PROMPT = 4096  # tokens
MATRIX_ROWS = 16  # fewest rows that the matrix unit takes
MIN_COLUMNS = 32  # of values: 64 bytes, which memory brings at once


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes of one kernel: rows of queries, keys of a block, and how it is compiled."""

    rows: int
    block: int
    schedule: Schedule
    programs_per_multiprocessor: int = 1


def programs_at_once(per_multiprocessor: int) -> int:
    """Programs that run at a time, each on one piece of work after the other."""
    return NUM_MULTIPROCESSORS * per_multiprocessor


def decode_tiling(head_dim: int, itemsize: int) -> Tiling:
    """Keeps about 100 KiB of keys and values in flight on each multiprocessor."""
    block = keys_of_block(head_dim, itemsize)
    if itemsize == 4 or head_dim > 256:
        return Tiling(MATRIX_ROWS, block, Schedule(4, 2), 2)
    if head_dim > 128:
        return Tiling(MATRIX_ROWS, block, Schedule(4, 5), 2)
    return Tiling(MATRIX_ROWS, block, Schedule(4, 3), 2)


def tile_tiling(num_tokens: int, head_dim: int, itemsize: int, *, is_long: bool) -> Tiling:
    """Rows do not change the order of a row's sums, so long prompts may have larger tiles: these
    read each key less often, but are too few for a short prompt. Contexts of several chunks
    (`is_long`) need registers for two sums.
    """
    block = keys_of_block(head_dim, itemsize)
    if itemsize == 4 or head_dim > 256:
        return Tiling(32, block, Schedule(4, 2))
    if head_dim > 128:
        return Tiling(64, block, Schedule(4, 2))
    return Tiling(256 if num_tokens >= LONG_PROMPT and not is_long else 128, block, Schedule(8, 3))


def keys_of_block(head_dim: int, itemsize: int) -> int:
    """The same for all kernels: the softmax is carried from block to block."""
    return 32 if itemsize == 4 or head_dim > 128 else 64


def alone_tiling(tiling: Tiling, columns: int, head_dim: int, itemsize: int) -> Tiling:
    """The same for programs that have a multiprocessor each: nobody else hides what they wait for.
    Of the stages, two bring a block: its page numbers, then its keys and values.
    """
    if itemsize == 4:
        return tiling
    stages = {32: 11, 64: 9}.get(columns, 7 if head_dim <= 128 else tiling.schedule.num_stages)
    schedule = Schedule(tiling.schedule.num_warps, stages)
    return Tiling(tiling.rows, tiling.block, schedule)


def decode_columns(head_dim: int, itemsize: int, kv_heads: int, num_seqs: int) -> int:
    """Columns of values of a program: all, or fewer where there are few programs."""
    columns = _power_of_two(head_dim)
    programs = kv_heads * num_seqs
    while columns > MIN_COLUMNS and itemsize == 2 and 2 * programs <= NUM_MULTIPROCESSORS:
        columns, programs = columns // 2, 2 * programs
    return columns


def ragged_paged_attention(
    q_TNH: jax.Array,
    kv_pages_PB2KH: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    is_decode: bool = False,
) -> jax.Array:
    T, N, H = q_TNH.shape
    K, dtype = kv_pages_PB2KH.shape[3], kv_pages_PB2KH.dtype
    if q_TNH.dtype not in DTYPES or dtype not in DTYPES:
        raise NotImplementedError(f"{q_TNH.dtype} queries, {dtype} pages")
    if H > MAX_HEAD_DIM or H % 8:
        raise NotImplementedError(f"head dim {H}: must be a multiple of 8 up to {MAX_HEAD_DIM}")
    require_cuda()
    num_seqs = jnp.asarray(num_seqs, jnp.int32)
    chunks = plan_chunks(cu_q_lens_S1, kv_lens_S, num_seqs, window, is_decode=is_decode)
    sinks_N = kv_lens_S if sinks_N is None else sinks_N.astype(jnp.float32)
    constants = {
        "N": N,
        "K": K,
        "H": H,
        "HP": _power_of_two(H),
        "B": kv_pages_PB2KH.shape[1],
        "M": page_table_SM.shape[1],
        "MAX_CHUNKS": MAX_CHUNKS,
        "SCALE": float(scale),
        "SOFT_CAP": float(soft_cap or 0.0),
        "HAS_SINKS": sinks_N.dtype == jnp.float32,
        # Float32 means float32: not TF32, which is Triton's default.
        "PRECISION": "ieee",
        "WIDE": q_TNH.dtype != dtype or dtype == jnp.float32,
    }
    prior_TNH = None
    if not is_decode:
        full = None
        # Mosaic's kernel is faster, and sums in an order of its own.
        is_plain = sinks_N.dtype != jnp.float32 and window is None and soft_cap is None
        if is_plain and not is_batch_invariant():
            full = mosaic_gpu.tile_queries(q_TNH, kv_pages_PB2KH)
        if full is not None:
            prior_TNH = mosaic_gpu.attend_full_tiles(
                q_TNH,
                kv_pages_PB2KH,
                page_table_SM,
                plan_full_tiles(cu_q_lens_S1, kv_lens_S, num_seqs, num_tokens=T, full_queries=full),
                scale,
            )
        sequences = cu_q_lens_S1, kv_lens_S, num_seqs
        for is_long in (False, True)[: _max_chunks(kv_pages_PB2KH, page_table_SM)]:
            tiling = tile_tiling(T, H, dtype.itemsize, is_long=is_long)
            tiles = plan_tiles(
                *sequences,
                num_tokens=T,
                tile_queries=max(1, tiling.rows // _power_of_two(N // K)),
                full_queries=full,
            )
            arrays = q_TNH, kv_pages_PB2KH, page_table_SM, sinks_N, prior_TNH
            of_tiles = constants | {"IS_LONG": is_long, "WINDOW": window or 0}
            prior_TNH = _attend_tiles(*arrays, tiles, tiling, of_tiles)
    return _decode(
        q_TNH, kv_pages_PB2KH, page_table_SM, cu_q_lens_S1, chunks, sinks_N, prior_TNH, constants
    )


def _max_chunks(kv_pages: jax.Array, page_table_SM: jax.Array) -> int:
    """The most that a context may have."""
    return min(MAX_CHUNKS, -(-page_table_SM.shape[1] * kv_pages.shape[1] // MIN_CHUNK))


def _attend_tiles(
    q_TNH: jax.Array,
    kv_pages: jax.Array,
    page_table_SM: jax.Array,
    sinks_N: jax.Array,
    prior_TNH: jax.Array | None,
    tiles: Tiles,
    tiling: Tiling,
    constants: dict[str, object],
) -> jax.Array:
    """Rows of sequences with several new tokens. Consumes `prior`, which holds some of them."""
    from jengine.pallas_kernels.ragged_paged_attention.triton_kernels import attend_tile

    K = kv_pages.shape[3]
    group = _power_of_two(q_TNH.shape[1] // K)
    return triton_call(
        attend_tile,
        (
            q_TNH,
            kv_pages,
            page_table_SM,
            tiles.items,
            tiles.num_items,
            sinks_N,
            q_TNH if prior_TNH is None else prior_TNH,
        ),
        [jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype)],
        grid=(tiles.items.shape[0] * K,),
        constants=constants
        | {
            "GP": group,
            "ROWS": max(tiling.rows, group),
            "BLOCK": tiling.block,
            "MIN_CHUNK": MIN_CHUNK,
            "DOUBLINGS": DOUBLINGS,
        },
        schedule=tiling.schedule,
        aliases={} if prior_TNH is None else {6: 0},
    )[0]


def _decode(
    q_TNH: jax.Array,
    kv_pages: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    chunks: Chunks,
    sinks_N: jax.Array,
    prior_TNH: jax.Array | None,
    constants: dict[str, object],
) -> jax.Array:
    """Rows of sequences with one new token. Consumes `prior`, which holds those of the others."""
    from jengine.pallas_kernels.ragged_paged_attention.triton_kernels import (
        decode_chunk,
        fold_chunks,
    )

    _, N, H = q_TNH.shape
    K, itemsize = kv_pages.shape[3], kv_pages.dtype.itemsize
    tiling = decode_tiling(H, itemsize)
    group = max(tiling.rows, _power_of_two(N // K))
    S, max_chunks = page_table_SM.shape[0], _max_chunks(kv_pages, page_table_SM)
    constants = constants | {"MAX_CHUNKS": max_chunks}
    columns = decode_columns(H, itemsize, K, S)
    slices = _power_of_two(H) // columns
    if S * K * slices <= NUM_MULTIPROCESSORS:
        tiling = alone_tiling(tiling, columns, H, itemsize)
    items = chunks.items.shape[0] * K * slices
    programs = min(items, programs_at_once(tiling.programs_per_multiprocessor))
    out, acc, top, total = triton_call(
        decode_chunk,
        (
            q_TNH,
            kv_pages,
            page_table_SM,
            cu_q_lens_S1,
            chunks.items,
            chunks.num_items,
            sinks_N,
            q_TNH if prior_TNH is None else prior_TNH,
        ),
        [
            jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype),
            jax.ShapeDtypeStruct((S, max_chunks, N, H), jnp.float32),
            jax.ShapeDtypeStruct((S, max_chunks, N), jnp.float32),
            jax.ShapeDtypeStruct((S, max_chunks, N), jnp.float32),
        ],
        grid=(programs,),
        constants=constants
        | {"GP": group, "BLOCK": tiling.block, "COLUMNS": columns, "NUM_PROGRAMS": programs},
        schedule=tiling.schedule,
        aliases={} if prior_TNH is None else {7: 0},
    )
    if max_chunks == 1:
        return out
    return triton_call(
        fold_chunks,
        (acc, top, total, chunks.to_fold, cu_q_lens_S1, sinks_N, out),
        [jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype)],
        grid=(S, K),
        constants={name: constants[name] for name in ("N", "K", "H", "HP", "HAS_SINKS")}
        | {
            "GP": _power_of_two(N // K),
            "MAX_CHUNKS": max_chunks,
        },
        schedule=Schedule(4, 4),
        aliases={6: 0},
    )[0]


def _power_of_two(n: int) -> int:
    return 1 << math.ceil(math.log2(n))
