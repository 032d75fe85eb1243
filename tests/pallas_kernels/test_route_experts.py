"""Routing against float64, and the independence of a row's bits from its batch."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.route_experts import reference
from jengine.pallas_kernels.route_experts.grouped import GroupedRouting

SIZES = ((1, 1), (2, 1), (8, 2), (60, 4), (128, 8), (129, 3))


def call(
    logits: np.ndarray, top_k: int, renormalise: bool, backend: ModuleType = reference
) -> tuple[np.ndarray, np.ndarray]:
    routed = jax.jit(backend.route, static_argnames=("top_k", "renormalise"))
    ids, weights = routed(logits, top_k, renormalise=renormalise)
    return np.asarray(ids), np.asarray(weights)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_equals_float64(
    experts: int, top_k: int, renormalise: bool, backend: ModuleType = reference
) -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((33, experts), np.float32)
    logits[5] -= 200.0  # far from zero: no overflow, no division by zero
    logits[6] += 200.0
    ids, weights = call(logits, top_k, renormalise, backend)
    exact = logits.astype(np.float64)
    expected_ids = np.argsort(-exact, axis=1, kind="stable")[:, :top_k]
    exact = np.exp(exact - exact.max(axis=1, keepdims=True))
    probabilities = np.take_along_axis(
        exact / exact.sum(axis=1, keepdims=True), expected_ids, axis=1
    )
    if renormalise:
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, probabilities, rtol=2e-6)


def test_equal_scores_go_to_the_lower_index() -> None:
    ids, weights = call(np.zeros((3, 8), np.float32), 3, True)
    np.testing.assert_array_equal(ids, [[0, 1, 2]] * 3)
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_bits_of_a_row_do_not_depend_on_the_batch(
    experts: int, top_k: int, renormalise: bool
) -> None:
    logits = 3 * np.random.default_rng(1).standard_normal((64, experts), np.float32)
    whole = call(logits, top_k, renormalise)
    for rows in (1, 2, 3, 7, 31):
        for first in (0, 64 - rows):
            part = call(logits[first : first + rows], top_k, renormalise)
            for got, expected in zip(part, whole, strict=True):
                np.testing.assert_array_equal(got, expected[first : first + rows])


GROUPED = (
    (16, 4, GroupedRouting("softmax", scale=1.5)),
    (24, 3, GroupedRouting("softmax", num_groups=4, top_groups=2, scale=16.0)),
    (64, 6, GroupedRouting("sigmoid", num_groups=8, top_groups=4, scale=2.5, has_bias=True)),
    (24, 5, GroupedRouting("sigmoid", has_bias=True)),
    (24, 5, GroupedRouting("sigmoid", num_groups=3, top_groups=1)),
    (24, 6, GroupedRouting("sqrtsoftplus", scale=1.5, has_bias=True)),
)


def call_grouped(
    logits: np.ndarray,
    bias: np.ndarray | None,
    top_k: int,
    routing: GroupedRouting,
    renorm: bool,
    backend: ModuleType = reference,
) -> tuple[np.ndarray, np.ndarray]:
    ids, weights = jax.jit(
        lambda x, b: backend.route_grouped(x, b, top_k, routing, renormalise=renorm)
    )(logits, bias)
    return np.asarray(ids), np.asarray(weights)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("experts", "top_k", "routing"), GROUPED)
def test_grouped_equals_float64(
    experts: int,
    top_k: int,
    routing: GroupedRouting,
    renormalise: bool,
    backend: ModuleType = reference,
) -> None:
    """One row, one group at a time."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((33, experts), np.float32)
    logits[5] -= 30.0
    bias = 0.3 * rng.standard_normal(experts, np.float32) if routing.has_bias else None
    ids, weights = call_grouped(logits, bias, top_k, routing, renormalise, backend)
    size = experts // routing.num_groups
    for t, row in enumerate(logits.astype(np.float64)):
        powers = np.exp(row - row.max())
        scores = {
            "softmax": powers / powers.sum(),
            "sigmoid": 1 / (1 + np.exp(-row)),
            "sqrtsoftplus": np.sqrt(np.log1p(np.exp(row))),
        }[routing.scoring]
        choice = scores if bias is None else scores + bias
        groups = choice.reshape(-1, size)
        worth = [np.sort(g)[::-1][: 1 if bias is None else 2].sum() for g in groups]
        best = np.argsort(worth)[::-1][: routing.top_groups]
        allowed = [e for e in range(experts) if e // size in best]
        expected = sorted(allowed, key=lambda e: -choice[e])[:top_k]
        np.testing.assert_array_equal(ids[t], expected)
        exact = scores[expected] / (scores[expected].sum() if renormalise else 1.0)
        np.testing.assert_allclose(weights[t], exact * routing.scale, rtol=3e-6)
    if backend is reference:
        args = jnp.asarray(logits), jnp.asarray(ids)
        given = reference.route_given(*args, routing, renormalise=renormalise)
        np.testing.assert_array_equal(np.asarray(given), weights)


@pytest.mark.parametrize(("experts", "top_k", "routing"), GROUPED)
def test_bits_of_a_grouped_row_do_not_depend_on_the_batch(
    experts: int, top_k: int, routing: GroupedRouting
) -> None:
    logits = 3 * np.random.default_rng(1).standard_normal((64, experts), np.float32)
    bias = logits[0] / 10 if routing.has_bias else None
    whole = call_grouped(logits, bias, top_k, routing, True)
    for rows in (1, 2, 3, 7, 31):
        for first in (0, 64 - rows):
            part = call_grouped(logits[first : first + rows], bias, top_k, routing, True)
            for got, expected in zip(part, whole, strict=True):
                np.testing.assert_array_equal(got, expected[first : first + rows])


# For Triton's interpreter: (experts, top_k, routing or None, renormalise).
INTERPRETED = (
    *((experts, k, None, renormalise) for experts, k in SIZES for renormalise in (False, True)),
    *((experts, k, routing, True) for experts, k, routing in GROUPED if routing.num_groups == 1),
)


def check(backend: ModuleType, case: tuple[int, int, GroupedRouting | None, bool]) -> None:
    experts, top_k, routing, renormalise = case
    if routing is None:
        test_equals_float64(experts, top_k, renormalise, backend)
    else:
        test_grouped_equals_float64(experts, top_k, routing, renormalise, backend)
