"""Attention over paged latents on NVIDIA GPUs (`triton_kernels.py`), absorbed for decode steps and
prompts alike. Work is planned, and splits are added up, as in `ragged_paged_attention`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.platform import require_cuda
from jengine.pallas_kernels.ragged_paged_attention.triton_gpu import programs_at_once
from jengine.pallas_kernels.ragged_paged_attention.work import (
    MAX_SPLITS,
    Splits,
    plan_splits,
    plan_tiles,
    splits_to_fill,
)
from jengine.pallas_kernels.triton_call import Schedule, triton_call

DTYPES = ("bfloat16", "float16", "float32")
MAX_VALUE_DIM, MAX_ROPE_DIM = 512, 64


@dataclass(frozen=True, slots=True)
class Tiling:
    """Heads of a program, rows of a tile of queries, keys of a block, and compilation."""

    heads: int
    rows: int
    block: int
    schedule: Schedule
    programs_per_multiprocessor: int = 1


def decode_tiling(num_heads: int, itemsize: int) -> Tiling:
    """Many heads share what they read: a program has as many as its registers hold."""
    heads = 16 if num_heads <= 16 else 32 if num_heads <= 32 else 64
    if itemsize == 4:
        return Tiling(16, 16, 16, Schedule(4, 2))
    if heads == 16:
        return Tiling(16, 16, 32, Schedule(4, 3), 2)
    return Tiling(heads, heads, 32, Schedule(8, 3))


def tile_tiling(num_heads: int, itemsize: int) -> Tiling:
    if itemsize == 4:
        return Tiling(16, 16, 16, Schedule(4, 2))
    heads = min(64, 1 << (num_heads - 1).bit_length())
    return Tiling(heads, 64, 32, Schedule(8, 2))


def mla_attention(
    q_TNE: jax.Array,
    pages_PBE: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    value_dim: int,
    scale: float,
    is_decode: bool = False,
) -> jax.Array:
    return attend(
        q_TNE,
        pages_PBE,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        num_seqs,
        value_dim=value_dim,
        scale=scale,
        is_decode=is_decode,
    )[0]


def attend(
    q_TNE: jax.Array,
    pages_PBE: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    value_dim: int,
    scale: float,
    is_decode: bool = False,
    earlier_only: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(out [T, N, C], and of sequences with several new tokens log2 of the softmax's sum, f32
    [T, N]). `earlier_only` leaves the tokens of this step out in those sequences.
    """
    T, N, E = q_TNE.shape
    C, R, dtype = value_dim, E - value_dim, pages_PBE.dtype
    if q_TNE.dtype not in DTYPES or dtype not in DTYPES:
        raise NotImplementedError(f"{q_TNE.dtype} queries, {dtype} pages")
    if C > MAX_VALUE_DIM or R > MAX_ROPE_DIM or C % 8 or R % 8:
        raise NotImplementedError(f"entries of {C} and {R}")
    require_cuda()
    from jengine.pallas_kernels.mla_attention.triton_kernels import attend_latent_tile

    num_seqs = jnp.asarray(num_seqs, jnp.int32)
    is_wide = q_TNE.dtype != dtype or dtype == jnp.float32
    itemsize = 4 if is_wide else dtype.itemsize
    constants = {
        "N": N,
        "C": C,
        "CP": max(16, 1 << (C - 1).bit_length()),
        "R": R,
        "RP": max(16, 1 << (R - 1).bit_length()),
        "B": pages_PBE.shape[1],
        "M": page_table_SM.shape[1],
        "SCALE": float(scale),
        "PRECISION": "ieee",  # float32 means float32: not TF32, which is Triton's default
        "WIDE": is_wide,
    }
    prior_TNC, lse_TN = None, jnp.zeros((), jnp.float32)
    if not is_decode:
        tile = tile_tiling(N, itemsize)
        tiles = plan_tiles(
            cu_q_lens_S1,
            kv_lens_S,
            num_seqs,
            num_tokens=T,
            tile_queries=tile.rows // tile.heads,
        )
        prior_TNC, lse_TN = triton_call(
            attend_latent_tile,
            (q_TNE, pages_PBE, page_table_SM, tiles.items, tiles.num_items, cu_q_lens_S1),
            [
                jax.ShapeDtypeStruct((T, N, C), q_TNE.dtype),
                jax.ShapeDtypeStruct((T, N), jnp.float32),
            ],
            grid=(tiles.items.shape[0] * -(-N // tile.heads),),
            constants=constants
            | {
                "HEADS": tile.heads,
                "ROWS": tile.rows,
                "BLOCK": tile.block,
                "EARLIER_ONLY": earlier_only,
            },
            schedule=tile.schedule,
        )
    tile = decode_tiling(N, itemsize)
    spread = splits_to_fill(
        programs_at_once(tile.programs_per_multiprocessor), -(-N // tile.heads), len(kv_lens_S)
    )
    splits = plan_splits(cu_q_lens_S1, kv_lens_S, num_seqs, spread)
    out_TNC = _decode(
        q_TNE, pages_PBE, page_table_SM, cu_q_lens_S1, splits, prior_TNC, itemsize, constants
    )
    return out_TNC, lse_TN


def _decode(
    q_TNE: jax.Array,
    pages_PBE: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    splits: Splits,
    prior_TNC: jax.Array | None,
    itemsize: int,
    constants: dict[str, object],
) -> jax.Array:
    """Rows of sequences with one new token. Consumes `prior`, which holds those of the others."""
    from jengine.pallas_kernels.mla_attention.triton_kernels import (
        combine_splits,
        decode_latent_split,
    )

    (T, N, _), C = q_TNE.shape, constants["C"]
    tile = decode_tiling(N, itemsize)
    W, S = splits.items.shape[0], page_table_SM.shape[0]
    programs = min(W * -(-N // tile.heads), programs_at_once(tile.programs_per_multiprocessor))
    out_shape = jax.ShapeDtypeStruct((T, N, C), q_TNE.dtype)
    out, acc, top, total = triton_call(
        decode_latent_split,
        (
            q_TNE,
            pages_PBE,
            page_table_SM,
            cu_q_lens_S1,
            splits.items,
            splits.num_items,
            q_TNE if prior_TNC is None else prior_TNC,
        ),
        [
            out_shape,
            jax.ShapeDtypeStruct((W, N, C), jnp.float32),
            jax.ShapeDtypeStruct((W, N), jnp.float32),
            jax.ShapeDtypeStruct((W, N), jnp.float32),
        ],
        grid=(programs,),
        constants=constants | {"HEADS": tile.heads, "BLOCK": tile.block, "NUM_PROGRAMS": programs},
        schedule=tile.schedule,
        aliases={} if prior_TNC is None else {6: 0},
    )
    groups = N // 4 if N % 4 == 0 else N  # heads of a program: 4, or 1
    return triton_call(
        combine_splits,
        (acc, top, total, splits.first, cu_q_lens_S1, splits.first, out),
        [out_shape],
        grid=(S, groups),
        constants={
            "N": N,
            "K": groups,
            "H": C,
            "HP": constants["CP"],
            "GP": N // groups,
            "MAX_SPLITS": MAX_SPLITS,
            "CHUNK": splits_at_once(N // groups * out_shape.shape[2]),
            "IS_DECODE": prior_TNC is None,
            "HAS_SINKS": False,
        },
        schedule=Schedule(4, 1),
        aliases={6: 0},
    )[0]


def splits_at_once(tile: int) -> int:
    """Splits, each a tile of so many numbers, that one program holds in registers."""
    return max(1, min(8, 4096 // tile))
