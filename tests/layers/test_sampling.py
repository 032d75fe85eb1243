"""The sampler against a sorting float64 oracle, and its independence of the batch."""

import dataclasses
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jengine.core.plan import ScheduledRequest, StepPlan
from jengine.layers import sampling
from jengine.layers.sampling import (
    RowState,
    count_sampled,
    logprobs,
    processed_logits,
    sample,
    top_k_threshold,
    top_p_threshold,
)
from jengine.request import FinishReason, Request, SamplingParams
from jengine.runtime.batch import (
    BatchLayout,
    banned_ids,
    build_batch,
    unpack_batch,
)
from jengine.runtime.row_mirror import RowMirror, is_adjusted
from tests.oracles.numpy_sampler import adjusted_logits, distribution, reported
from tests.oracles.numpy_sampler import processed_logits as expected_logits

V, R = 97, 8
LAYOUT = BatchLayout(
    num_tokens=8, num_seqs=8, num_groups=1, pages_per_seq=4, num_rows=R, vocab_size=V
)


class FixedMask:
    """A constraint that never changes."""

    def __init__(self, mask: np.ndarray) -> None:
        self.is_ready = True
        self.mask: np.ndarray | None = mask
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None

    def advance(self, token_id: int, banned: Iterable[int]) -> None:
        """Nothing changes."""


@dataclasses.dataclass
class Row:
    params: SamplingParams
    prompt: list[int]
    output: list[int]
    seed: int = 0
    constraint: FixedMask | None = None

    def request(self) -> Request:
        request = Request("r", list(self.prompt), self.params, frozenset({1, 2}), seed=self.seed)
        request.token_ids = self.prompt + self.output
        if self.constraint is not None:
            request.constrain(self.constraint)
        return request


def run(rows: list[Row], logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, RowState]:
    """Sample one token for each row through the packed batch, as a decode step does."""
    ids, finite, state = _sample(*prepare(rows, logits))
    return np.asarray(ids)[: len(rows)], np.asarray(finite)[: len(rows)], state


def prepare(
    rows: list[Row], logits: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, RowState]:
    """(packed batch, masks, logits of the bucket, row state)."""
    scheduled = []
    state = RowState(
        jnp.zeros(R, jnp.int32),
        jnp.zeros((R, V), jnp.int32),
        jnp.zeros((R, V), jnp.bool_),
        jnp.zeros((R, V), jnp.float32),
    )
    counts, mask, bias = (np.array(x) for x in (state.output_counts, state.prompt_mask, state.bias))
    for i, row in enumerate(rows):
        request = row.request()
        start = request.num_tokens - 1
        scheduled.append(ScheduledRequest(request, R - 1 - i, start, 1, ([1, 2, 3],), True, True))
        if is_adjusted(row.params):
            counts[R - 1 - i] = np.bincount(row.output, minlength=V)
            mask[R - 1 - i, row.prompt] = True
            if row.params.allowed_token_ids is not None:
                bias[R - 1 - i] = -np.inf
                bias[R - 1 - i, row.params.allowed_token_ids] = 0
            for token, value in (row.params.logit_bias or {}).items():
                bias[R - 1 - i, token] += value
    state = RowState(state.last_token, jnp.array(counts), jnp.array(mask), jnp.array(bias))
    plan = StepPlan(0, tuple(scheduled), len(rows))
    mirror = RowMirror(1, R, 4)
    for item in scheduled:
        mirror.admit(item)
    batch = build_batch(plan, LAYOUT, mirror)
    full = np.zeros((8, V), np.float32)
    full[: len(rows)] = logits

    masks = np.zeros(LAYOUT.mask_shape, np.int32) if batch.masks is None else batch.masks
    return batch.packed, masks, full, state


@jax.jit
def _process(packed: jax.Array, masks: jax.Array, full: jax.Array, state: RowState) -> jax.Array:
    return processed_logits(full, state, unpack_batch(packed, masks, LAYOUT).sampling)


@jax.jit
def _sample(packed: jax.Array, masks: jax.Array, full: jax.Array, state: RowState):
    batch = unpack_batch(packed, masks, LAYOUT)
    ids, finite = sample(full, state, batch.sampling)
    return ids, finite, count_sampled(state, batch.sampling, ids, batch.samples)


def random_logits(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (n, V)).astype(np.float32)


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    logits = random_logits(2)
    logits[0, [5, 60]] = 50.0
    ids, finite, _ = run([Row(SamplingParams(temperature=0), [3], [])] * 2, logits)
    assert ids.tolist() == [5, int(logits[1].argmax())]
    assert finite.all()


@given(st.integers(0, 10_000), st.integers(1, V), st.floats(0.01, 1.0))
@settings(max_examples=20, deadline=None)
def test_thresholds_match_a_sort(seed: int, k: int, p: float) -> None:
    x = np.round(random_logits(1, seed), 1)  # rounding makes ties
    got = float(top_k_threshold(jnp.array(x), jnp.array([k], jnp.int32))[0])
    assert got == np.sort(x[0])[::-1][k - 1]
    kept = x[0] >= float(top_p_threshold(jnp.array(x), jnp.array([p], jnp.float32))[0])
    probs = np.exp(x[0].astype(np.float64) - x[0].max())
    probs /= probs.sum()
    smallest = x[0][kept].min()
    assert kept.sum() == (x[0] >= smallest).sum()  # all ties of the last entry
    assert probs[kept].sum() >= p - 1e-5
    assert probs[x[0] > smallest].sum() < p + 1e-5  # one value fewer is not enough


CASES = {
    "plain": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.3),
    "top_k": SamplingParams(temperature=1.5, top_k=7),
    "top_p": SamplingParams(temperature=1.2, top_p=0.8),
    "min_p": SamplingParams(temperature=2.0, min_p=0.1),
    "all": SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
    "penalties": SamplingParams(
        temperature=1.0, repetition_penalty=1.7, presence_penalty=0.9, frequency_penalty=-0.6
    ),
    "bias": SamplingParams(temperature=1.0, logit_bias={5: 4.0, 6: -100.0}),
    "allowed": SamplingParams(temperature=1.0, allowed_token_ids=[3, 4, 5, 50]),
    "min_tokens": SamplingParams(temperature=1.0, min_tokens=9, stop_token_ids=[10]),
    "bad_words": SamplingParams(
        temperature=1.0, bad_word_ids=[[7], [22, 9], [21, 22, 11], [4, 12]]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_oracle_distribution(name: str) -> None:
    """4,000 seeded draws per case; total variation within what that many draws of the oracle would
    show.
    """
    params, prompt, output = CASES[name], [5, 8, 13], [21, 21, 22]
    logits = random_logits(1, seed=3)
    logits[0, [1, 2, 10, 7, 9, 11]] += 4.0  # tokens the bans must catch
    row = Row(params, prompt, output)
    item = ScheduledRequest(row.request(), 0, 5, 1, ([1],), True, True)
    expected = distribution(
        adjusted_logits(logits[0], params, prompt, output, banned_ids(item)), params
    )
    counts = np.zeros(V)
    for seed in range(0, 4000, 8):
        rows = [Row(params, prompt, output, seed=(seed + i) * 7919 + (i << 40)) for i in range(8)]
        ids, _, _ = run(rows, np.repeat(logits, 8, axis=0))
        np.add.at(counts, ids, 1)
    assert counts[expected == 0].sum() == 0
    draws = np.random.default_rng(0).multinomial(4000, expected, size=400) / 4000
    limit = np.quantile(np.abs(draws - expected).sum(axis=1), 0.999)
    assert np.abs(counts / 4000 - expected).sum() <= limit * 1.05


def test_processed_logits_match_the_oracle_in_every_mode() -> None:
    """Each case beside the others, greedy and not; as logits and as log-probabilities."""
    for cases in (list(CASES.values())[:6], list(CASES.values())[6:]):
        every = [*cases, cases[-1].clone(temperature=0.0), SamplingParams(temperature=0.0)]
        rows = [Row(params, [5, 8, 13], [21, 21, 22]) for params in every]
        logits = random_logits(len(rows), seed=4)
        got = np.asarray(_process(*prepare(rows, logits)))[: len(rows)]
        for row, mine, processed in zip(rows, logits, got, strict=True):
            item = ScheduledRequest(row.request(), 0, 5, 1, ([1],), True, True)
            adjusted = adjusted_logits(mine, row.params, row.prompt, row.output, banned_ids(item))
            expected = expected_logits(adjusted, row.params)
            assert ((processed == -np.inf) == (expected == -np.inf)).all()
            np.testing.assert_allclose(processed, expected, rtol=1e-5, atol=1e-5)
            token = int(expected.argmax())
            for is_normalised in (False, True):
                scores = logprobs(
                    jnp.array(processed)[None], jnp.array([token]), 4, jnp.bool_(True),
                    is_normalised=is_normalised,
                )  # fmt: skip
                with np.errstate(divide="ignore"):
                    values = reported(expected, is_normalised=is_normalised)
                np.testing.assert_allclose(scores.chosen[0], values[token], rtol=1e-5, atol=1e-5)
                best = np.sort(values)[::-1][:4]
                np.testing.assert_allclose(scores.top_values[0], best, rtol=1e-5, atol=1e-5)
                assert scores.rank[0] == 1


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    logits = random_logits(8, seed=11)
    rows = [
        Row(SamplingParams(temperature=1.0, top_p=0.9), [3], [4], seed=i * 31) for i in range(8)
    ]
    together, _, _ = run(rows, logits)
    alone = [run([rows[i]], logits[i : i + 1])[0][0] for i in range(8)]
    assert together.tolist() == alone
    other, _, _ = run([Row(SamplingParams(temperature=0), [3], []), *rows[1:]], logits)
    assert other[1:].tolist() == together[1:].tolist()


def test_rows_in_blocks_draw_what_they_draw_together(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(8, seed=12)
    rows = [Row(p, [5, 8], [21, 22], seed=i * 31) for i, p in enumerate(list(CASES.values())[3:])]
    rows[4] = dataclasses.replace(rows[4], constraint=mask_of([5, 50]))

    def results() -> list[np.ndarray]:
        jax.clear_caches()  # traces do not know the constant
        ids, _, _ = run(rows, logits)
        scores = logprobs(jnp.array(logits), jnp.array(ids), 3, jnp.bool_(True))
        return [ids, *map(np.asarray, jax.tree.leaves(scores))]

    together = results()
    monkeypatch.setattr(sampling, "ROWS_AT_ONCE", 2)
    for block, whole in zip(results(), together, strict=True):
        np.testing.assert_array_equal(block, whole)
    ids = jnp.zeros(8, jnp.int32)
    jaxpr = jax.make_jaxpr(lambda x: logprobs(x, ids, 3, jnp.bool_(True)))(logits)
    assert re.search(r"\b(while|scan)\[", str(jaxpr))


def test_seed_and_position_both_matter() -> None:
    logits = np.zeros((8, V), np.float32)
    params = SamplingParams(temperature=1.0)
    by_seed, _, _ = run([Row(params, [3], [], seed=i) for i in range(8)], logits)
    by_high_word, _, _ = run([Row(params, [3], [], seed=i << 32) for i in range(8)], logits)
    by_position, _, _ = run([Row(params, [3], [4] * i) for i in range(8)], logits)
    assert all(len(set(ids.tolist())) > 4 for ids in (by_seed, by_high_word, by_position))


def test_only_the_broken_row_is_not_finite() -> None:
    logits = random_logits(4)
    logits[1, 7], logits[2, 9], logits[3] = np.nan, np.inf, -np.inf
    _, finite, _ = run([Row(SamplingParams(temperature=0), [3], [])] * 4, logits)
    assert finite.tolist() == [True, False, False, False]


def test_row_state_counts_only_adjusted_rows() -> None:
    rows = [
        Row(SamplingParams(temperature=0, presence_penalty=0.5), [3], [4, 4]),
        Row(SamplingParams(temperature=0), [3], []),
    ]
    ids, _, state = run(rows, random_logits(2))
    assert np.asarray(state.last_token)[[R - 1, R - 2]].tolist() == ids.tolist()
    counts = np.bincount([4, 4, ids[0]], minlength=V)
    assert np.array_equal(np.asarray(state.output_counts)[R - 1], counts)
    assert not np.asarray(state.output_counts)[R - 2].any()


def test_logprobs_match_log_softmax() -> None:
    logits = random_logits(3)
    ids = jnp.array([4, 9, int(logits[2].argmax())], jnp.int32)
    got = logprobs(jnp.array(logits), ids, 5, jnp.bool_(True))
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    chosen = exact[np.arange(3), np.asarray(ids)]
    np.testing.assert_allclose(got.chosen, chosen, atol=1e-5)
    order = np.argsort(-exact, axis=1)
    assert np.array_equal(np.asarray(got.top_ids), order[:, :5])
    ranks = [1 + int(np.where(order[i] == int(ids[i]))[0][0]) for i in range(3)]
    assert np.asarray(got.rank).tolist() == ranks


def mask_of(allowed: list[int]) -> FixedMask:
    bits = np.zeros(LAYOUT.mask_shape[1] * 32, np.uint8)
    bits[allowed] = 1
    return FixedMask(np.packbits(bits, bitorder="little").view(np.int32))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_tokens_of_the_mask_are_drawn(temperature: float) -> None:
    logits = random_logits(8, seed=5)
    params = SamplingParams(temperature=temperature, top_p=0.9, repetition_penalty=1.3)
    free = [Row(params, [3], [4], seed=i) for i in range(8)]
    unbound, _, _ = run(free, logits)
    allowed = [0, 31, 32, 63, 64, V - 1]  # bits at the ends of words, the sign bit among them
    rows = [
        dataclasses.replace(row, constraint=mask_of(allowed)) if i % 2 else row
        for i, row in enumerate(free)
    ]
    for _ in range(4):
        ids, finite, _ = run(rows, logits)
        assert finite.all()
        assert set(ids[1::2].tolist()) <= set(allowed)
        assert ids[0::2].tolist() == unbound[0::2].tolist(), "neighbours do not notice"
    for token in allowed:
        one = dataclasses.replace(free[0], constraint=mask_of([token]))
        assert run([one], logits[:1])[0].tolist() == [token]


def test_a_masked_greedy_row_takes_the_best_allowed_token() -> None:
    logits = random_logits(3, seed=6)
    allowed = [2, 40, 41, 90]
    greedy = SamplingParams(temperature=0)
    rows = [Row(greedy, [3], []), Row(greedy, [3], [], constraint=mask_of(allowed))]
    ids, _, _ = run([*rows, rows[0]], logits)
    best = allowed[int(logits[1, allowed].argmax())]
    assert ids.tolist() == [int(logits[0].argmax()), best, int(logits[2].argmax())]
