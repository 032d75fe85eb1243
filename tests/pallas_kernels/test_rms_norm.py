"""`rms_norm` against float64, and the independence of a row's bits from its batch."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.rms_norm.cases import CASES, Case

OPERATION = "rms_norm"
EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}


INTERPRETED = CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(backend: ModuleType, case: Case) -> None:
    check(backend, case)


def check(backend: ModuleType, case: Case) -> None:
    x, weight = case.build()
    x = x.astype(case.dtype)
    out = jax.jit(backend.rms_norm, static_argnames="eps")(x, weight, eps=case.eps)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + case.eps) * weight
    assert out.dtype == case.dtype
    tolerance = (2 * EPS[case.dtype] + 4 * EPS["float32"]) * np.abs(expected)
    assert np.all(np.abs(np.asarray(out, np.float64) - expected) <= tolerance)


@pytest.mark.parametrize("width", [64, 576])
def test_bits_of_a_row_do_not_depend_on_the_batch(backend: ModuleType, width: int) -> None:
    x, weight = Case(128, width).build()
    call = jax.jit(backend.rms_norm, static_argnames="eps")
    whole = np.asarray(call(x, weight, eps=1e-5))
    for rows in (1, 2, 3, 4, 7, 8, 31, 64):
        part = np.asarray(call(x[5 : 5 + rows], weight, eps=1e-5))
        np.testing.assert_array_equal(part, whole[5 : 5 + rows], err_msg=f"{rows} rows")


def test_padding_rows_are_finite_and_touch_nothing(backend: ModuleType) -> None:
    x, weight = Case(24, 64).build()
    whole = np.asarray(backend.rms_norm(x, weight, eps=1e-5))
    out = np.asarray(backend.rms_norm(x, weight, eps=1e-5, num_tokens=jnp.int32(7)))
    np.testing.assert_array_equal(out[:7], whole[:7])
    assert np.isfinite(out).all()
