"""The compression of tokens against float64, for every length and every cut of a sequence."""

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.compress_tokens import reference, state_size
from jengine.pallas_kernels.compress_tokens.pieces import cut_into_pieces

H = 5
SIZES = ((4, 2), (4, 1), (3, 2), (128, 1))  # tokens an entry, halves
TOLERANCE = 1e-5
INTERPRETED = ((4, 2),)
ON_DEVICE = SIZES


def draw(length: int, halves: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(values, scores) of one sequence; scores far apart, so that a softmax has few tokens."""
    rng = np.random.default_rng(seed)
    values, scores = rng.standard_normal((2, length, halves, H), np.float32)
    return values, 6 * scores


def entries_float64(values: np.ndarray, scores: np.ndarray, r: int) -> np.ndarray:
    """[L // r, H], one entry and one channel at a time."""
    values, scores = values.astype(np.float64), scores.astype(np.float64)
    halves = values.shape[1]
    out = np.zeros((len(values) // r, H))
    for j in range(len(out)):
        for h in range(H):
            own = slice(j * r, (j + 1) * r)
            s, v = scores[own, -1, h], values[own, -1, h]
            if halves == 2 and j > 0:
                before = slice((j - 1) * r, j * r)
                s = np.concatenate([scores[before, 0, h], s])
                v = np.concatenate([values[before, 0, h], v])
            weights = np.exp(s - s.max())
            out[j, h] = weights @ v / weights.sum()
    return out


class Batch:
    """Sequences whose steps are chosen by the test. Unused states hold NaN."""

    def __init__(
        self,
        texts: Sequence[tuple[np.ndarray, np.ndarray]],
        r: int,
        backend: ModuleType = reference,
        *,
        moves: bool = True,
    ) -> None:
        self.texts, self.r, self.backend = texts, r, backend
        halves = texts[0][0].shape[1]
        # Page 0 is null; sequence s takes turns in two pages of its own, or stays in one.
        self.moves = moves
        self.states = jnp.full((1 + 2 * len(texts), state_size(halves, H)), jnp.nan)
        self.done = [0] * len(texts)
        self.entries: list[list[np.ndarray]] = [[] for _ in texts]
        self.num_steps = 0
        self.turns = [0] * len(texts)

    def step(self, sizes: Sequence[int], *, is_decode: bool = False, padding: int = 3) -> None:
        """So many tokens of each sequence; two more sequences are padding."""
        values, scores = (
            np.concatenate(
                [
                    text[i][d : d + n]
                    for text, d, n in zip(self.texts, self.done, sizes, strict=True)
                ]
                + [np.full((padding, *self.texts[0][0].shape[1:]), 7.0, np.float32)]
            )
            for i in (0, 1)
        )
        spare = padding if is_decode else 2
        lens = [*sizes, *[0] * spare]
        kv_lens = np.array([d + n for d, n in zip(self.done, sizes, strict=True)] + [0] * spare)
        cu = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        turn = self.num_steps % 2 if self.moves else 0
        slots = np.full((2, len(lens)), -1, np.int32)
        for s, (done, n) in enumerate(zip(self.done, sizes, strict=True)):
            if n:
                slots[0, s] = 1 + 2 * s + self.turns[s] if done else -1
                slots[1, s] = 1 + 2 * s + turn
        out, pieces, self.states = compress(
            values, scores, self.states, slots, cu, kv_lens.astype(np.int32),
            r=self.r, is_decode=is_decode, backend=self.backend,
        )  # fmt: skip
        out, pieces = np.asarray(out), jax.tree.map(np.asarray, pieces)
        for g in np.flatnonzero(pieces.last_row >= 0):
            s = int(pieces.seq[g])
            assert pieces.group[g] == len(self.entries[s])
            last = int(pieces.last_row[g]) - cu[s] + self.done[s]
            assert last == (pieces.group[g] + 1) * self.r - 1
            self.entries[s].append(out[g])
        assert np.isfinite(out).all()
        for s, n in enumerate(sizes):
            self.done[s] += n
            if n:
                self.turns[s] = turn
        self.num_steps += 1

    def check(self) -> None:
        for (values, scores), done, entries in zip(
            self.texts, self.done, self.entries, strict=True
        ):
            expected = entries_float64(values[:done], scores[:done], self.r)
            assert len(entries) == len(expected)
            if len(entries):
                np.testing.assert_allclose(np.stack(entries), expected, atol=TOLERANCE)


@partial(jax.jit, static_argnames=("r", "is_decode", "backend"))
def compress(values, scores, states, slots, cu, kv_lens, *, r, is_decode, backend):
    pieces = cut_into_pieces(cu, kv_lens, len(values), r, is_decode=is_decode)
    out, states = backend.compress_tokens(
        values, scores, states, slots, pieces, is_decode=is_decode
    )
    return out, pieces, states


@pytest.mark.parametrize(("r", "halves"), SIZES, ids=str)
def test_every_length_at_once(r: int, halves: int) -> None:
    """Of a batch of sequences: those of 0 to 3 r + 1 tokens, some of them for long groups."""
    lengths = range(3 * r + 2) if r < 8 else (0, 1, r - 1, r, r + 1, 2 * r, 3 * r + 1)
    batch = Batch([draw(3 * r + 1, halves, seed) for seed in range(len(lengths))], r)
    batch.step(list(lengths))
    batch.check()


@pytest.mark.parametrize(("r", "halves"), SIZES, ids=str)
def test_an_entry_has_the_same_bits_however_it_was_cut(r: int, halves: int) -> None:
    check(reference, (r, halves))


def check(backend: ModuleType, size: tuple[int, int]) -> None:
    """Steps that end anywhere, among neighbours that go another pace; then tokens one by one."""
    r, halves = size
    length = 2 * r + 2
    texts = [draw(length, halves, seed) for seed in range(3)]
    whole = Batch(texts, r, backend)
    whole.step([length] * 3)
    whole.check()
    cut = Batch(texts, r, backend)
    for sizes in ([1, r - 1, 2], [r, 2, 0], [0, r - 2, r]):
        cut.step(sizes)
    while any(left := [min(1, length - done) for done in cut.done]):
        if all(left):
            cut.step(left, is_decode=True)
        else:
            cut.step([length - done for done in cut.done])
    cut.check()
    assert cut.done == [length] * 3
    for got, expected in zip(cut.entries, whole.entries, strict=True):
        check_equal(got, expected)
    alone = Batch(texts[:1], r, backend, moves=False)
    for _ in range(length):
        alone.step([1], is_decode=True, padding=0)
    check_equal(alone.entries[0], whole.entries[0])
    # Two groups in a step that goes on from a finished one.
    aligned = Batch([draw(3 * r, halves)], r, backend)
    aligned.step([r])
    aligned.step([2 * r])
    aligned.check()


def check_equal(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """XLA:CPU of JAX 0.10 makes fused multiply-adds across barriers, in some shapes only."""
    error = np.abs(np.stack(got) - np.stack(expected)).max()
    assert error <= (0 if jax.__version_info__ >= (0, 11) else 1e-6)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_scores_far_from_zero(shift: float) -> None:
    """The group before the first has no tokens, not tokens of score 0."""
    values, scores = draw(11, 2)
    batch = Batch([(values, scores + np.float32(shift))], 4)
    batch.step([11])
    batch.check()
