"""What the GPU kernels of one step have to do, worked out on the device.

Every layer asks for it anew; XLA computes it once, for the requests are equal.

A sequence with one new token is cut along its context into splits (`decode_split`), one with more
into tiles of queries (`attend_tile`). How a row is cut depends on its own length and on the bucket,
never on its neighbours: within a bucket its sums are formed in the same order in any company.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_SPLITS = 32


class Splits(NamedTuple):
    """The contexts of sequences with one new token, cut into splits."""

    items: jax.Array  # i32[W, 4]: sequence, first position, end, number of splits of the sequence
    num_items: jax.Array  # i32[1]
    first: jax.Array  # i32[S + 1]; sequence s owns splits first[s]:first[s + 1]


class Tiles(NamedTuple):
    """The other sequences' new tokens, cut into tiles of queries; then the padding."""

    items: jax.Array  # i32[W, 4]: sequence, first token, number of queries, position of the first
    num_items: jax.Array  # i32[1]


def plan_splits(
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    window: int | None,
    smallest: int | None = None,
) -> Splits:
    """Splits of the sequences with one new token, of no fewer positions than `smallest`
    (`min_split` by default).
    """
    S = kv_lens_S.shape[0]
    is_decode_S = (jnp.diff(cu_q_lens_S1) == 1) & (jnp.arange(S, dtype=jnp.int32) < num_seqs)
    begin_S = jnp.zeros_like(kv_lens_S)
    if window is not None:
        begin_S = jnp.maximum(kv_lens_S - window, 0)
    size_S = split_size(kv_lens_S, smallest or min_split(S))
    first_page_S, last_page_S = begin_S // size_S, -(-kv_lens_S // size_S)
    count_S = jnp.where(is_decode_S, last_page_S - first_page_S, 0)
    first_S1 = _exclusive_sums(count_S)
    item_W = jnp.arange(S * MAX_SPLITS, dtype=jnp.int32)
    sequence_W = _owner(first_S1, item_W)
    size_W = size_S[sequence_W]
    start_W = (item_W - first_S1[sequence_W] + first_page_S[sequence_W]) * size_W
    items = jnp.stack(
        [
            sequence_W,
            jnp.maximum(start_W, begin_S[sequence_W]),
            jnp.minimum(start_W + size_W, kv_lens_S[sequence_W]),
            count_S[sequence_W],
        ],
        axis=1,
    )
    return Splits(items, first_S1[-1:], first_S1)


def split_size(kv_lens_S: jax.Array, smallest: int) -> jax.Array:
    """Positions in a split: a power of two that gives at most `MAX_SPLITS` of them."""
    # What a split costs by itself is saved where a context needs none.
    size_S = jnp.where(kv_lens_S <= 2 * smallest, 2 * smallest, smallest)
    for power in range(smallest.bit_length(), 26):
        half = 1 << (power - 1)
        size_S = jnp.where(kv_lens_S > half * MAX_SPLITS, 1 << power, size_S)
    return size_S


def min_split(num_seqs: int) -> int:
    """Fewest positions in a split. Many sequences fill the device without (64 of 1,024 positions
    take 98 us whole, 105 and 4 to add up in splits of 256); a few need them.
    """
    return 256 if num_seqs <= 32 else 512


def plan_tiles(
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    num_tokens: int,
    tile_queries: int,
    full_queries: int | None = None,
) -> Tiles:
    """Tiles of the sequences with several new tokens, and of the padding after the last token.

    With `full_queries` only what `plan_full_tiles` leaves over: the first tokens of each sequence.
    """
    q_lens_S = _chunk_lens(cu_q_lens_S1, num_seqs)
    used = cu_q_lens_S1[num_seqs]
    lens_S = q_lens_S if full_queries is None else q_lens_S % full_queries
    num_padding = num_tokens - used
    # The padding is one more sequence, of no context.
    lens_S1 = jnp.append(lens_S, num_padding)
    starts_S1 = jnp.append(cu_q_lens_S1[:-1], used)
    positions_S1 = jnp.append(kv_lens_S - q_lens_S, -num_padding)
    sequence_W, first_W, queries_W, count = _cut(
        lens_S1, tile_queries, num_tokens // tile_queries + lens_S1.shape[0]
    )
    is_padding_W = sequence_W == kv_lens_S.shape[0]
    items = jnp.stack(
        [
            jnp.where(is_padding_W, 0, sequence_W),
            starts_S1[sequence_W] + first_W,
            queries_W,
            jnp.where(is_padding_W, -queries_W, positions_S1[sequence_W] + first_W),
        ],
        axis=1,
    )
    return Tiles(items, count)


def plan_full_tiles(
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    num_tokens: int,
    full_queries: int,
) -> Tiles:
    """Tiles of exactly `full_queries`, counted from the end of each sequence; i32[W, 4]: sequence,
    first token, its position, context length.
    """
    q_lens_S = _chunk_lens(cu_q_lens_S1, num_seqs)
    lens_S = q_lens_S - q_lens_S % full_queries
    sequence_W, first_W, _, count = _cut(lens_S, full_queries, num_tokens // full_queries)
    first_W = first_W - lens_S[sequence_W]  # from the end
    items = jnp.stack(
        [
            sequence_W,
            cu_q_lens_S1[1:][sequence_W] + first_W,
            kv_lens_S[sequence_W] + first_W,
            kv_lens_S[sequence_W],
        ],
        axis=1,
    )
    return Tiles(items, count)


def _chunk_lens(cu_q_lens_S1: jax.Array, num_seqs: jax.Array) -> jax.Array:
    """New tokens of the sequences that have several, else 0."""
    q_lens_S = jnp.diff(cu_q_lens_S1)
    is_chunk_S = (q_lens_S > 1) & (jnp.arange(q_lens_S.shape[0], dtype=jnp.int32) < num_seqs)
    return jnp.where(is_chunk_S, q_lens_S, 0)


def _cut(
    lens_S: jax.Array, size: int, max_items: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Pieces of at most `size`: (sequence, first, length) of each, and i32[1], their number.

    In reverse: the last tiles of a prompt see most keys, so they come first and none starts late.
    """
    first_S1 = _exclusive_sums(-(-lens_S // size))
    total = first_S1[-1]
    item_W = jnp.maximum(total - 1 - jnp.arange(max_items, dtype=jnp.int32), 0)
    sequence_W = _owner(first_S1, item_W)
    done_W = (item_W - first_S1[sequence_W]) * size
    return sequence_W, done_W, jnp.minimum(lens_S[sequence_W] - done_W, size), total[None]


def _exclusive_sums(count_S: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(count_S, dtype=jnp.int32)])


def _owner(first_S1: jax.Array, item_W: jax.Array) -> jax.Array:
    """The sequence that an item belongs to; for items past the end, the last one."""
    return jnp.sum(first_S1[None, 1:-1] <= item_W[:, None], axis=1, dtype=jnp.int32)
