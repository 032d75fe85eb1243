"""What the GPU kernels of one step have to do, worked out on the device.

Every layer asks for it anew; XLA computes it once, for the requests are equal.

A sequence with one new token is cut along its context into chunks (`decode_chunk`), one with more
into tiles of queries (`attend_tile`). How the sums of a row are cut, into chunks, depends on its
own length only (`chunk_of`). Attention over latents has splits that depend on the bucket, too
(`plan_splits`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MIN_CHUNK = 8192  # positions; up to here a context is one
MAX_CHUNKS = 32  # of a context
DOUBLINGS = 8  # of a chunk
MAX_SPLITS = 32  # of a context
SPLIT_BLOCK = 64  # positions; kernels read as many at once, or a fraction
MIN_BLOCKS, MAX_BLOCKS = 2, 32  # of a split; more only in contexts of more than 32 times as many


class Chunks(NamedTuple):
    """The contexts of sequences with one new token, cut into chunks."""

    items: jax.Array  # i32[W, 5]: sequence, first position, end, number of the chunk, is it all
    num_items: jax.Array  # i32[1]
    to_fold: jax.Array  # i32[S, 2]: first and end; none where one chunk is all


class Splits(NamedTuple):
    """The contexts of sequences with one new token, cut into splits."""

    items: jax.Array  # i32[W, 4]: sequence, first position, end, number of splits of the sequence
    num_items: jax.Array  # i32[1]
    first: jax.Array  # i32[S + 1]; sequence s owns splits first[s]:first[s + 1]


class Tiles(NamedTuple):
    """The other sequences' new tokens, cut into tiles of queries; then the padding."""

    items: jax.Array  # i32[W, 4]: sequence, first token, number of queries, position of the first
    num_items: jax.Array  # i32[1]


def chunk_of(lens: jax.Array) -> jax.Array:
    """Positions in a chunk of contexts of these lengths: `MIN_CHUNK`, doubled until `MAX_CHUNKS`
    reach. Many positions, since folding costs a prompt's tiles their registers; not too many, so
    that one long request still fills a device; at most a fixed number of chunks, so that what they
    leave has room.
    """
    chunk = jnp.full_like(lens, MIN_CHUNK)
    for doubling in range(DOUBLINGS):
        size = MIN_CHUNK << doubling
        chunk = jnp.where(lens > MAX_CHUNKS * size, 2 * size, chunk)
    return chunk


def plan_chunks(
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    window: int | None,
    *,
    is_decode: bool,
) -> Chunks:
    """Chunks of the contexts of sequences with one new token. `is_decode`: sequences past the last
    are padding tokens, and have an item of no positions.
    """
    S = kv_lens_S.shape[0]
    begin_S = jnp.zeros_like(kv_lens_S)
    if window is not None:
        begin_S = jnp.maximum(kv_lens_S - window, 0)
    chunk_S = chunk_of(kv_lens_S)
    first_S = begin_S // chunk_S
    has_work_S = _is_decode(cu_q_lens_S1, num_seqs) & (kv_lens_S > 0)
    count_S = -(-kv_lens_S // chunk_S) - first_S
    count_S = jnp.where(has_work_S, count_S, 1 if is_decode else 0)
    end_S = jnp.where(has_work_S, kv_lens_S, begin_S)
    first_item_S1 = _exclusive_sums(count_S)
    item_W = jnp.arange(S * MAX_CHUNKS, dtype=jnp.int32)
    sequence_W = _owner(first_item_S1, item_W)
    number_W = first_S[sequence_W] + item_W - first_item_S1[sequence_W]

    def edge(number_W: jax.Array) -> jax.Array:
        at_W = number_W * chunk_S[sequence_W]
        return jnp.clip(at_W, begin_S[sequence_W], end_S[sequence_W])

    is_all_W = (count_S[sequence_W] == 1).astype(jnp.int32)
    items = [sequence_W, edge(number_W), edge(number_W + 1), number_W, is_all_W]
    to_fold_S2 = first_S[:, None] + jnp.stack([jnp.zeros_like(count_S), count_S], axis=1)
    to_fold_S2 = jnp.where((count_S > 1)[:, None], to_fold_S2, 0)
    return Chunks(jnp.stack(items, axis=1), first_item_S1[-1:], to_fold_S2)


def plan_splits(
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    spread: int,
) -> Splits:
    """Splits of the sequences with one new token: equal but for a block, so that the programs that
    work on them end together.

    A context is cut into `spread` splits where it is long enough: what it takes to fill the device
    (`splits_to_fill`). Longer splits than `MAX_BLOCKS` there are none, up to `MAX_SPLITS` of them.
    """
    S = kv_lens_S.shape[0]
    is_decode_S = _is_decode(cu_q_lens_S1, num_seqs)
    blocks_S = -(-kv_lens_S // SPLIT_BLOCK)
    count_S = jnp.maximum(
        -(-blocks_S // MAX_BLOCKS), jnp.minimum(spread, blocks_S // MIN_BLOCKS)
    ).clip(1, MAX_SPLITS)
    count_S = jnp.where(is_decode_S & (kv_lens_S > 0), count_S, 0)
    first_S1 = _exclusive_sums(count_S)
    item_W = jnp.arange(S * MAX_SPLITS, dtype=jnp.int32)
    sequence_W = _owner(first_S1, item_W)
    split_W = item_W - first_S1[sequence_W]

    def edge(split_W: jax.Array) -> jax.Array:
        count_W = jnp.maximum(count_S[sequence_W], 1)
        block_W = split_W * blocks_S[sequence_W] // count_W
        return jnp.minimum(block_W * SPLIT_BLOCK, kv_lens_S[sequence_W])

    items = jnp.stack([sequence_W, edge(split_W), edge(split_W + 1), count_S[sequence_W]], axis=1)
    return Splits(items, first_S1[-1:], first_S1)


def splits_to_fill(num_programs: int, items_per_split: int, num_seqs: int) -> int:
    """Splits of each sequence that keep all programs of a device at work, with one item each."""
    return max(1, num_programs // (items_per_split * num_seqs))


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


def _is_decode(cu_q_lens_S1: jax.Array, num_seqs: jax.Array) -> jax.Array:
    """Which sequences have one new token."""
    q_lens_S = jnp.diff(cu_q_lens_S1)
    return (q_lens_S == 1) & (jnp.arange(q_lens_S.shape[0], dtype=jnp.int32) < num_seqs)


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
