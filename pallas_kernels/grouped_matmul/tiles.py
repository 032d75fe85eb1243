"""Tokens in the order of their experts, cut into tiles that one expert's weights serve.

By counting, without a comparison sort; all shapes are static worst cases, and how much of them is
used is data. Every back end may start from this.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

MIN_TILE_ROWS, MAX_TILE_ROWS = 8, 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertTiles:
    """Pairs of (token, expert) in the order of experts, within an expert in the order of tokens.

    Tile g holds the pairs `start[g]:stop[g]`; tiles lie side by side without gaps. Tiles at or
    past `num_tiles` are empty. M = T * k pairs, G tiles.
    """

    expert_G: jax.Array  # i32
    start_G: jax.Array  # i32
    stop_G: jax.Array  # i32
    num_tiles: jax.Array  # i32[]
    token_M: jax.Array  # i32: token of each pair; 0 past the last
    rank_Tk: jax.Array  # i32: where a token's pairs stand in that order; 0 of padding tokens


def tile_rows(num_tokens: int, top_k: int, num_experts: int) -> int:
    """Rows of a tile where nothing better is known: about twice an expert's mean share."""
    share = max(1, 2 * num_tokens * top_k // num_experts)
    return min(max(MIN_TILE_ROWS, 1 << (share - 1).bit_length()), MAX_TILE_ROWS)


def build_tiles(
    expert_ids_Tk: jax.Array, num_experts: int, rows: int, num_tokens: jax.Array
) -> ExpertTiles:
    """`rows`: the most that a tile may hold. The experts of one token must be distinct; tokens at
    or past `num_tokens`, and pairs with expert `num_experts`, are in no tile.
    """
    (T, k), E = expert_ids_Tk.shape, num_experts
    experts = jnp.arange(E, dtype=jnp.int32)
    is_real_T1 = (jnp.arange(T, dtype=jnp.int32) < num_tokens)[:, None]
    chosen_TE = jnp.any(expert_ids_Tk[:, :, None] == experts[None, None, :], axis=1) & is_real_T1
    upto_TE = jnp.cumsum(chosen_TE.astype(jnp.int32), axis=0)
    count_E = upto_TE[-1]
    end_E = jnp.cumsum(count_E)

    earlier_TE = (end_E - count_E)[None, :] + upto_TE - 1  # pairs before a token's, if it chose e
    # The least of all integers where the expert is none: it is no place, and dropped below.
    rank_Tk = jnp.take_along_axis(earlier_TE, expert_ids_Tk, axis=1)
    tokens_Tk = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], (T, k))
    place_Tk = jnp.where(is_real_T1, rank_Tk, T * k)  # out of bounds: dropped
    token_M = jnp.zeros(T * k, jnp.int32).at[place_Tk.ravel()].set(tokens_Tk.ravel(), mode="drop")

    tiles_E = (count_E + rows - 1) // rows
    last_tile_E = jnp.cumsum(tiles_E)
    # A touched expert wastes less than one tile, and there are at most E and at most T * k of them.
    tile_G = jnp.arange(min(E, T * k) + T * k // rows, dtype=jnp.int32)
    is_past_GE = tile_G[:, None] >= last_tile_E[None, :]
    expert_G = jnp.minimum(jnp.sum(is_past_GE, axis=1, dtype=jnp.int32), E - 1)
    nth_G = tile_G - (last_tile_E - tiles_E)[expert_G]
    start_G = jnp.minimum((end_E - count_E)[expert_G] + nth_G * rows, end_E[expert_G])
    stop_G = jnp.minimum(start_G + rows, end_E[expert_G])
    return ExpertTiles(
        expert_G, start_G, stop_G, last_tile_E[-1], token_M, jnp.where(is_real_T1, rank_Tk, 0)
    )
