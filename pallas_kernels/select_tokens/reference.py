"""Plain-JAX `select_tokens`: loops over sequences and query tiles, each of which scores its context
block by block, finds the k-th best score bit by bit, and collects what is not below it.

No sort: of a float's bits, ordered as an unsigned number, the k-th best is the largest number that
k scores reach, found from its highest bit down by counting. Every loop ends where the context does;
a tile whose contexts fit into k neither scores nor searches.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

QUERY_TILE = 8
KEY_BLOCK = 128  # positions scored at a time
SEARCH_BLOCK = 2048  # positions counted at a time
SCORE_BITS = 32


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How contexts are cut. `search` is a multiple of `block`, that of the page size."""

    page: int
    block: int
    search: int
    top_k: int

    @classmethod
    def of(cls, page: int, pages_per_seq: int, top_k: int) -> "Sizes":
        block = max(1, KEY_BLOCK // page) * page
        blocks = -(-page * pages_per_seq // block)
        search = block * max(1, min(blocks, SEARCH_BLOCK // block))
        return cls(page, block, search, min(top_k, page * pages_per_seq))


def select_tokens(
    q_TJX: jax.Array,
    weights_TJ: jax.Array,
    pages_PBE: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    top_k: int,
    scale: float,
    tokens_per_entry: int = 1,
) -> jax.Array:
    T = q_TJX.shape[0]
    sizes = Sizes.of(pages_PBE.shape[1], page_table_SM.shape[1], top_k)
    # Dynamic slices clamp at the end of the array and would shift: pad so that none reaches it.
    q_TJX = jnp.pad(q_TJX, ((0, QUERY_TILE), (0, 0), (0, 0)))
    weights_TJ = jnp.pad(weights_TJ.astype(jnp.float32), ((0, QUERY_TILE), (0, 0)))
    spare = -page_table_SM.shape[1] % (sizes.search // sizes.page)
    page_table_SM = jnp.pad(page_table_SM, ((0, 0), (0, spare)))

    def run_sequence(s: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple:
        start, q_len, kv_len = cu_q_lens_S1[s], cu_q_lens_S1[s + 1] - cu_q_lens_S1[s], kv_lens_S[s]
        table_M = page_table_SM[s]

        def run_tile(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple:
            # A tile may write past the sequence's last token: the next sequence then writes over
            # it.
            slots_Tk, ranks_QL = carry
            at, first = start + i * QUERY_TILE, kv_len - q_len + i * QUERY_TILE
            end = lax.div(jnp.minimum(first + QUERY_TILE, kv_len), jnp.int32(tokens_per_entry))
            is_chosen_from = end > sizes.top_k
            q_QJX, weights_QJ = (
                lax.dynamic_slice_in_dim(x, at, QUERY_TILE) for x in (q_TJX, weights_TJ)
            )
            ranks_QL = _score(
                q_QJX, weights_QJ, pages_PBE, table_M, ranks_QL,
                jnp.where(is_chosen_from, end, 0), scale, sizes,
            )  # fmt: skip
            position_Q = jnp.minimum(first + lax.iota(jnp.int32, QUERY_TILE), kv_len - 1)
            last_Q = lax.div(position_Q + 1, jnp.int32(tokens_per_entry)) - 1
            new_Qk = _choose(ranks_QL, table_M, last_Q, end, is_chosen_from, sizes)
            return lax.dynamic_update_slice_in_dim(slots_Tk, new_Qk, at, 0), ranks_QL

        num_tiles = lax.div(q_len + QUERY_TILE - 1, jnp.int32(QUERY_TILE))
        return lax.fori_loop(0, num_tiles, run_tile, carry)

    slots_Tk = jnp.full((q_TJX.shape[0], sizes.top_k), -1, jnp.int32)
    # One for all tiles: each reads only what it has written, but for tiles that do not choose.
    ranks_QL = jnp.zeros((QUERY_TILE, page_table_SM.shape[1] * sizes.page), jnp.uint32)
    num_seqs = jnp.asarray(num_seqs, jnp.int32)
    slots_Tk, _ = lax.fori_loop(0, num_seqs, run_sequence, (slots_Tk, ranks_QL))
    return slots_Tk[:T]


def _score(
    q_QJX: jax.Array,
    weights_QJ: jax.Array,
    pages_PBE: jax.Array,
    table_M: jax.Array,
    ranks_QL: jax.Array,
    end: jax.Array,
    scale: float,
    sizes: Sizes,
) -> jax.Array:
    """`ranks` with the scores of positions before `end`, as numbers in the order of the scores.
    Unused slots of the last block may score NaN: `_choose` looks at no such position.
    """
    Q, J, X = q_QJX.shape
    C, block_pages, offset = sizes.block, sizes.block // sizes.page, pages_PBE.shape[2] - X
    dtype = q_QJX.dtype if q_QJX.dtype == pages_PBE.dtype else jnp.dtype(jnp.float32)
    q_RX = q_QJX.reshape(Q * J, X).astype(dtype)

    def score_block(block: jax.Array, ranks_QL: jax.Array) -> jax.Array:
        pages = lax.dynamic_slice_in_dim(table_M, block * block_pages, block_pages)
        keys_CX = pages_PBE[pages, :, offset:].reshape(C, X).astype(dtype)
        s_RC = jnp.einsum(
            "RX,CX->RC",
            q_RX,
            keys_CX,
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,  # not TF32
            preferred_element_type=jnp.float32,
        )
        s_QJC = jnp.maximum(s_RC * scale, 0.0).reshape(Q, J, C)
        s_QC = jnp.sum(s_QJC * weights_QJ[:, :, None], axis=1)
        return lax.dynamic_update_slice(ranks_QL, _order(s_QC), (0, block * C))

    return lax.fori_loop(0, lax.div(end + (C - 1), jnp.int32(C)), score_block, ranks_QL)


def _order(x: jax.Array) -> jax.Array:
    """u32: float32 numbers as unsigned ones in the same order, none of them 0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0 equals 0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _choose(
    ranks_QL: jax.Array,
    table_M: jax.Array,
    last_Q: jax.Array,
    end: jax.Array,
    is_chosen_from: jax.Array,
    sizes: Sizes,
) -> jax.Array:
    """i32[Q, k]: slots of the k best positions up to `last`, all before `end`; then -1."""
    C, k, Q = sizes.search, sizes.top_k, ranks_QL.shape[0]
    num_blocks = lax.div(end + (C - 1), jnp.int32(C))

    def load(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        ranks_QC = lax.dynamic_slice_in_dim(ranks_QL, block * C, C, axis=1)
        index_C = block * C + lax.iota(jnp.int32, C)
        return ranks_QC, index_C[None, :] <= last_Q[:, None]

    def count(rank_Q: jax.Array) -> jax.Array:
        """How many positions reach it."""

        def add(block: jax.Array, total_Q: jax.Array) -> jax.Array:
            ranks_QC, is_seen_QC = load(block)
            reaches_QC = (ranks_QC >= rank_Q[:, None]) & is_seen_QC
            return total_Q + jnp.sum(reaches_QC, axis=1, dtype=jnp.int32)

        return lax.fori_loop(0, num_blocks, add, jnp.zeros((Q,), jnp.int32))

    def try_bit(i: jax.Array, rank_Q: jax.Array) -> jax.Array:
        higher_Q = rank_Q | (jnp.uint32(1 << (SCORE_BITS - 1)) >> i.astype(jnp.uint32))
        return jnp.where(count(higher_Q) >= k, higher_Q, rank_Q)

    # Where nothing is to choose this stays 0, which every position reaches, whatever it scored.
    num_bits = jnp.where(is_chosen_from, SCORE_BITS, 0)
    worst_Q = lax.fori_loop(0, num_bits, try_bit, jnp.zeros((Q,), jnp.uint32))
    equals_taken_Q = k - count(worst_Q + 1)

    def collect(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slots_Qk, num_taken_Q, num_equal_Q = carry
        ranks_QC, is_seen_QC = load(block)
        is_equal_QC = is_seen_QC & (ranks_QC == worst_Q[:, None])
        place_QC = num_equal_Q[:, None] + jnp.cumsum(is_equal_QC, axis=1, dtype=jnp.int32)
        is_taken_QC = is_seen_QC & (ranks_QC > worst_Q[:, None])
        is_taken_QC |= is_equal_QC & (place_QC <= equals_taken_Q[:, None])
        order_QC = num_taken_Q[:, None] + jnp.cumsum(is_taken_QC, axis=1, dtype=jnp.int32)
        pages = lax.dynamic_slice_in_dim(table_M, block * (C // sizes.page), C // sizes.page)
        offsets = lax.iota(jnp.int32, sizes.page)[None, :]
        slot_C = (pages[:, None] * sizes.page + offsets).reshape(C)
        column_QC = jnp.where(is_taken_QC, order_QC - 1, k)  # k: dropped
        row_Q1 = lax.iota(jnp.int32, Q)[:, None]
        slots_Qk = slots_Qk.at[row_Q1, column_QC].set(slot_C[None, :], mode="drop")
        return slots_Qk, order_QC[:, -1], place_QC[:, -1]

    zeros_Q = jnp.zeros((Q,), jnp.int32)
    carry = (jnp.full((Q, k), -1, jnp.int32), zeros_Q, zeros_Q)
    return lax.fori_loop(0, num_blocks, collect, carry)[0]
