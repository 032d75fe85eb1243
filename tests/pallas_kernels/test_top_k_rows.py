"""`top_k_rows` against a stable float64 sort."""

import importlib
from types import ModuleType

import jax
import numpy as np
import pytest

from jengine.pallas_kernels.platform import tracing_for
from jengine.pallas_kernels.top_k_rows.cases import SHAPES, build_rows


@pytest.fixture(params=["reference", "xla_gpu"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"jengine.pallas_kernels.top_k_rows.{request.param}")


@pytest.mark.parametrize(("columns", "k"), SHAPES)
def test_largest_first_and_ties_by_index(backend: ModuleType, columns: int, k: int) -> None:
    if backend.__name__.endswith("gpu") and k > backend.MAX_K:
        pytest.skip("left to the reference")
    rows = build_rows(columns)
    expected = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :k]
    with tracing_for("cuda"):  # plain JAX: runs anywhere
        values, indices = jax.jit(backend.top_k_rows, static_argnums=1)(rows, k)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(rows, expected, axis=1))
    assert indices.dtype == np.int32


def test_indices_of_a_row_with_nan_are_in_range() -> None:
    rows = build_rows(1000)
    rows[0, 7] = np.nan
    rows[1] = np.nan
    backend = importlib.import_module("jengine.pallas_kernels.top_k_rows.xla_gpu")
    with tracing_for("cuda"):
        _, indices = jax.jit(backend.top_k_rows, static_argnums=1)(rows, 20)
    assert ((np.asarray(indices) >= 0) & (np.asarray(indices) < 1000)).all()
