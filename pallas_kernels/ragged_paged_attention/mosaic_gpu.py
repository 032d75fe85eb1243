"""The part of ragged paged attention that Pallas Mosaic GPU does: full tiles of long prompts
(`mosaic_kernels.py`).
"""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.platform import is_hopper
from jengine.pallas_kernels.ragged_paged_attention.work import Tiles

QUERIES = 64  # of a tile
HEADS = 2
BLOCK = 128  # keys
MIN_TOKENS = 2048  # below, the Triton kernel is faster: 36 of 43 us for 1,024
HEAD_DIMS = (64, 128)


def tile_queries(q_TNH: jax.Array, kv_pages_PB2KH: jax.Array) -> int | None:
    """Queries in a full tile, or None: not these arguments."""
    T, N, H = q_TNH.shape
    B, K = kv_pages_PB2KH.shape[1], kv_pages_PB2KH.shape[3]
    fits = (
        is_hopper()
        and q_TNH.dtype == kv_pages_PB2KH.dtype == jnp.bfloat16
        and T >= MIN_TOKENS
        and H in HEAD_DIMS
        and (N // K) % HEADS == 0
        and B % 8 == 0
        and BLOCK % B == 0
    )
    return QUERIES if fits else None


def attend_full_tiles(
    q_TNH: jax.Array,
    kv_pages_PB2KH: jax.Array,
    page_table_SM: jax.Array,
    tiles: Tiles,
    scale: float,
) -> jax.Array:
    """[T, N, H]: rows of the tiles; other rows are not written."""
    from jengine.pallas_kernels.ragged_paged_attention.mosaic_kernels import Shape, attend_tiles

    P, B, _, K, H = kv_pages_PB2KH.shape
    shape = Shape(q_TNH.shape[1], K, H, B, tiles.items.shape[0], scale)
    rows = kv_pages_PB2KH.reshape(P * B, 2 * K, H)
    # The last block of a context may reach past the table's end.
    table_SM = jnp.pad(page_table_SM, ((0, 0), (0, BLOCK // B)))
    return attend_tiles(q_TNH, rows, table_SM, tiles.items.reshape(-1), tiles.num_items, shape)
