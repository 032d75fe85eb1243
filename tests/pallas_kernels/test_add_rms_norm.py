"""`add_rms_norm` against float64."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.add_rms_norm import reference
from jengine.pallas_kernels.add_rms_norm.cases import CASES, Case

INTERPRETED = CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case) -> None:
    check(reference, case)


def check(backend: ModuleType, case: Case) -> None:
    x, parts, weight = case.build()
    x, weight = x.astype(case.dtype), weight.astype(case.dtype)
    parts = parts if case.parts > 1 else parts.astype(case.dtype)
    run = jax.jit(backend.add_rms_norm, static_argnames="eps")
    total, normed = run(x, parts, weight, eps=case.eps)
    assert total.dtype == normed.dtype == case.dtype
    eps = float(jnp.finfo(case.dtype).eps)
    branch = parts.astype(np.float64).sum(0)
    expected = x.astype(np.float64) + branch
    # The block's result is rounded, then the sum: half a unit each of what is rounded.
    error = np.abs(np.asarray(total, np.float64) - expected)
    assert np.all(error <= eps / 2 * (np.abs(branch) + np.abs(expected)) * 1.01 + 1e-6)
    wide = np.asarray(total, np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + case.eps)
    expected = expected * weight.astype(np.float64)
    error = np.abs(np.asarray(normed, np.float64) - expected)
    assert np.all(error <= (eps + 1e-6) * np.abs(expected))
    if case.parts > 1 and case.rows > 1:
        check_padding(run, case, x, parts, weight, np.asarray(total))


def check_padding(run, case: Case, x, parts, weight, total: np.ndarray) -> None:
    """Rows past the last token have no summands."""
    used = case.rows // 2
    parts = parts.copy()
    parts[:, used:] = np.nan
    out = run(x, parts, weight, eps=case.eps, num_tokens=np.int32(used))
    np.testing.assert_array_equal(np.asarray(out[0])[:used], total[:used])
    for array in out:
        assert np.isfinite(np.asarray(array).astype(np.float32)).all()
