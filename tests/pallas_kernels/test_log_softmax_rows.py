"""`log_softmax_rows` against float64."""

from types import ModuleType

import jax
import numpy as np
import pytest

from jengine.pallas_kernels.log_softmax_rows import api
from jengine.pallas_kernels.log_softmax_rows.cases import CASES, Case

INTERPRETED = CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case) -> None:
    check(api, case)


def check(backend: ModuleType, case: Case) -> None:
    x = case.build()
    out = np.asarray(jax.jit(backend.log_softmax_rows)(x), np.float64)
    wide = x.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    expected = wide - top - np.log(np.exp(wide - top).sum(axis=1, keepdims=True))
    is_cut = np.isneginf(x)
    assert np.isneginf(out[is_cut]).all()
    # A difference and a logarithm, each rounded; the sum's error is that of its relative size.
    out, expected = out[~is_cut], expected[~is_cut]
    assert np.all(np.abs(out - expected) <= 2.0**-23 * (2 * np.abs(expected) + 8))
