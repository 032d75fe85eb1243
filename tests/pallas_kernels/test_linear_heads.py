"""`linear_heads` against float64, and the independence of a row's bits from its batch."""

import jax
import numpy as np
import pytest

from jengine.pallas_kernels.linear_heads.cases import CASES, Case
from jengine.pallas_kernels.linear_heads.reference import linear_heads

EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case) -> None:
    x, w = case.build()
    x, w = x.astype(case.x_dtype), w.astype(case.w_dtype)
    out = jax.jit(linear_heads)(x, w, num_tokens=np.int32(case.num_tokens))
    assert out.dtype == case.x_dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    expected = np.stack(
        [x[:, n].astype(np.float64) @ w[n].astype(np.float64).T for n in range(case.heads)], axis=1
    )
    error = np.abs(np.asarray(out, np.float64) - expected)[: case.num_tokens]
    tolerance = 4 * EPS["float32"] * case.depth + EPS[case.x_dtype] * np.abs(expected)
    assert np.all(error <= tolerance[: case.num_tokens])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bits_of_a_row_do_not_depend_on_the_batch(dtype: str) -> None:
    x, w = Case(40, 40, 3, 96, 33).build()
    x, w = x.astype(dtype), w.astype(dtype)
    call = jax.jit(linear_heads)
    whole = np.asarray(call(x, w, num_tokens=np.int32(40)))
    for rows in (1, 2, 3, 5, 8, 13, 31):
        for first in (0, 40 - rows):
            part = np.asarray(call(x[first : first + rows], w, num_tokens=np.int32(rows)))
            np.testing.assert_array_equal(part, whole[first : first + rows])
