"""`silu_mul` against float64, and the independence of a row's bits from its batch."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.silu_mul.cases import CASES, Case

OPERATION = "silu_mul"
EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}


INTERPRETED = CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(backend: ModuleType, case: Case) -> None:
    check(backend, case)


def check(backend: ModuleType, case: Case) -> None:
    x = case.build().astype(case.dtype)
    out = np.asarray(jax.jit(backend.silu_mul)(x), np.float64)
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    expected = gate / (1.0 + np.exp(-gate)) * up
    tolerance = (EPS[case.dtype] + 8 * EPS["float32"]) * np.abs(expected) + 1e-30
    assert np.all(np.abs(out - expected) <= tolerance)


def test_bits_of_a_row_do_not_depend_on_the_batch(backend: ModuleType) -> None:
    x = Case(64, 1536, "float32").build()
    call = jax.jit(backend.silu_mul)
    whole = np.asarray(call(x))
    for rows in (1, 2, 7, 31):
        part = np.asarray(call(x[5 : 5 + rows]))
        np.testing.assert_array_equal(part, whole[5 : 5 + rows], err_msg=f"{rows} rows")


def test_padding_rows_are_finite_and_touch_nothing(backend: ModuleType) -> None:
    x = Case(24, 64).build()
    whole = np.asarray(backend.silu_mul(x))
    out = np.asarray(backend.silu_mul(x, num_tokens=jnp.int32(7)))
    np.testing.assert_array_equal(out[:7], whole[:7])
    assert np.isfinite(out).all()
