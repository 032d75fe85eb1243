"""`argmax_rows` against stated indices and `jnp.argmax`."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.argmax_rows.cases import COLUMNS, build_rows

OPERATION = "argmax_rows"


@pytest.mark.parametrize("columns", COLUMNS)
def test_first_largest_or_first_nan(backend: ModuleType, columns: int) -> None:
    rows, expected = build_rows(columns)
    if columns == 1:
        expected = np.zeros_like(expected)
    out = np.asarray(jax.jit(backend.argmax_rows)(rows))
    assert out.dtype == np.int32
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(out, np.asarray(jnp.argmax(jnp.asarray(rows), axis=1)))
