"""The work lists of the GPU attention kernels: every query and every position exactly once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jengine.pallas_kernels.ragged_paged_attention.work import (
    MAX_BLOCKS,
    MAX_CHUNKS,
    MAX_SPLITS,
    MIN_BLOCKS,
    MIN_CHUNK,
    SPLIT_BLOCK,
    chunk_of,
    plan_chunks,
    plan_full_tiles,
    plan_splits,
    plan_tiles,
)

TOKENS, SEQS = 512, 12
LENS = st.lists(
    st.tuples(st.sampled_from((1, 1, 1, 2, 31, 32, 33, 64, 70, 128)), st.integers(0, 5000)),
    max_size=SEQS,
)
Batch = tuple[jax.Array, jax.Array, jax.Array, list[tuple[int, int]]]


def batch_of(lens: list[tuple[int, int]]) -> Batch:
    """(cu_q_lens, kv_lens, num_seqs, [(new tokens, context)]), padded; the rest is left out."""
    kept: list[tuple[int, int]] = []
    for new, before in lens:
        if sum(n for n, _ in kept) + new <= TOKENS:
            kept.append((new, before + new))
    cu = np.concatenate([[0], np.cumsum([n for n, _ in kept], dtype=np.int32)])
    cu = np.pad(cu, (0, SEQS - len(kept)), mode="edge").astype(np.int32)
    kv = np.pad(np.array([c for _, c in kept], np.int32), (0, SEQS - len(kept)))
    return jnp.asarray(cu), jnp.asarray(kv), jnp.int32(len(kept)), kept


@settings(max_examples=60, deadline=None)
@given(LENS, st.sampled_from((1, 4, 33)))
def test_splits_cover_what_decodes_read(lens: list[tuple[int, int]], spread: int) -> None:
    cu, kv, num_seqs, kept = batch_of(lens)
    plan = jax.jit(plan_splits, static_argnums=3)(cu, kv, num_seqs, spread)
    items, first = np.asarray(plan.items), np.asarray(plan.first)
    assert items.shape == (SEQS * MAX_SPLITS, 4)
    for s in range(SEQS):
        mine = items[first[s] : first[s + 1]]
        if s >= len(kept) or kept[s][0] > 1:
            assert len(mine) == 0
            continue
        context = kept[s][1]
        assert (mine[:, 0] == s).all() and (mine[:, 3] == len(mine)).all()
        assert len(mine) <= MAX_SPLITS
        edges = [0, *mine[:, 2].tolist()]
        assert mine[:, 1].tolist() == edges[:-1] and edges[-1] == context
        blocks = -(-mine[:, 2] // SPLIT_BLOCK) - mine[:, 1] // SPLIT_BLOCK
        assert blocks.min() >= 1 and blocks.max() - blocks.min() <= 1
        assert blocks.max() <= MAX_BLOCKS
        assert len(mine) >= min(spread, MAX_SPLITS, blocks.sum() // MIN_BLOCKS)


LONG_LENS = st.lists(
    st.tuples(st.sampled_from((1, 1, 1, 2, 33)), st.integers(0, 1 << 21)), max_size=SEQS
)


@settings(max_examples=60, deadline=None)
@given(LONG_LENS, st.sampled_from((None, 1, 100, 1000)))
def test_chunks_cover_what_decodes_read(lens: list[tuple[int, int]], window: int | None) -> None:
    cu, kv, num_seqs, kept = batch_of(lens)
    plan = jax.jit(plan_chunks, static_argnums=3, static_argnames="is_decode")
    items, num_items, to_fold = map(np.asarray, plan(cu, kv, num_seqs, window, is_decode=False))
    items = items[: num_items[0]]
    for s in range(SEQS):
        mine = items[items[:, 0] == s]
        if s >= len(kept) or kept[s][0] > 1:
            assert len(mine) == 0 and (to_fold[s] == 0).all()
            continue
        context = kept[s][1]
        size = max(MIN_CHUNK, 1 << (-(-context // MAX_CHUNKS) - 1).bit_length())
        assert int(chunk_of(jnp.int32(context))) == size
        begin = 0 if window is None else max(0, context - window)
        numbers = range(begin // size, -(-context // size))
        assert mine[:, 3].tolist() == list(numbers) and max(numbers) < MAX_CHUNKS
        assert mine[:, 1].tolist() == [max(begin, n * size) for n in numbers]
        assert mine[:, 2].tolist() == [min(context, (n + 1) * size) for n in numbers]
        assert (mine[:, 4] == (len(mine) == 1)).all()
        several = [numbers[0], numbers[-1] + 1] if len(numbers) > 1 else [0, 0]
        assert to_fold[s].tolist() == several


def test_padding_of_a_decode_step_has_items_of_nothing() -> None:
    items, num_items, _ = plan_chunks(*batch_of([(1, 3000), (1, 9000)])[:3], None, is_decode=True)
    mine = np.asarray(items)[: int(num_items[0])]
    assert mine[:, 0].tolist() == [0, 1, 1, *range(2, SEQS)]
    assert (mine[3:, 1] == mine[3:, 2]).all() and (mine[3:, 4] == 1).all()


def test_cuts_of_a_context_do_not_depend_on_the_others() -> None:
    alone = plan_splits(*batch_of([(1, 3000)])[:3], 4)
    among = plan_splits(*batch_of([(1, 77), (1, 3000), (1, 4999)])[:3], 4)
    mine = np.asarray(among.items)[int(among.first[1]) : int(among.first[2]), 1:]
    np.testing.assert_array_equal(mine, np.asarray(alone.items)[: int(alone.first[1]), 1:])


@settings(max_examples=60, deadline=None)
@given(LENS, st.sampled_from((None, 64)))
def test_tiles_cover_each_chunk_and_the_padding(
    lens: list[tuple[int, int]], full: int | None
) -> None:
    cu, kv, num_seqs, kept = batch_of(lens)
    seen = np.full(TOKENS, -1)  # position of the query computed for a token

    def take(first: int, count: int, position: int) -> None:
        assert (seen[first : first + count] == -1).all() and first + count <= TOKENS
        seen[first : first + count] = np.arange(position, position + count)

    tiles = plan_tiles(cu, kv, num_seqs, num_tokens=TOKENS, tile_queries=32, full_queries=full)
    padding = 0
    for sequence, first, count, position in np.asarray(tiles.items)[: int(tiles.num_items[0])]:
        assert 0 < count <= 32
        if position < 0:  # padding: no keys
            assert position == -count
            take(first, count, 10**6)
            padding += count
        else:
            assert cu[sequence] <= first and first + count <= cu[sequence + 1]
            take(first, count, position)
    if full is not None:
        plan = plan_full_tiles(cu, kv, num_seqs, num_tokens=TOKENS, full_queries=full)
        for sequence, first, position, context in np.asarray(plan.items)[: int(plan.num_items[0])]:
            assert context == kv[sequence] and first + full <= cu[sequence + 1]
            take(first, full, position)
    used = sum(n for n, _ in kept)
    assert padding == TOKENS - used
    for s, (new, context) in enumerate(kept):
        expected = -1 if new == 1 else np.arange(context - new, context)
        np.testing.assert_array_equal(seen[cu[s] : cu[s + 1]], expected)


def test_the_longest_tiles_come_first() -> None:
    cu, kv, num_seqs, _ = batch_of([(128, 0), (128, 1000)])
    tiles = plan_tiles(cu, kv, num_seqs, num_tokens=256, tile_queries=32)
    positions = np.asarray(tiles.items)[:8, 3]
    assert positions.tolist() == sorted(positions.tolist(), reverse=True)
    assert positions[0] == pytest.approx(1096)
