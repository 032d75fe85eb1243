"""Norms and rotations of vectors against float64."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.norm_and_rotate import reference
from jengine.pallas_kernels.norm_and_rotate.cases import CASES, Case

NORM_EPS = 1e-6
EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}
INTERPRETED = CASES
ON_DEVICE = (Case(64, 64, 512, 32), Case(300, 1, 640, 32, "float32"))


def check(backend: ModuleType, case: Case) -> None:
    x, cos, sin = case.build()
    x = x.astype(case.dtype)
    call = jax.jit(
        lambda x, *rest: backend.norm_and_rotate(x, *rest, jnp.int32(len(x)), eps=NORM_EPS)
    )
    out = np.asarray(call(x, cos, sin))
    assert out.dtype == case.dtype
    wide = x.astype(np.float64)
    normed = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + NORM_EPS)
    tail = normed[..., case.dim - 2 * case.pairs :]
    turned = (tail[..., ::2] + 1j * tail[..., 1::2]) * (cos + 1j * sin)[:, None, :]
    tail[..., ::2], tail[..., 1::2] = turned.real, turned.imag
    # Rounded twice, and a pair's rounding errors mix; sums are float32.
    tolerance = 2 * EPS[case.dtype] * np.abs(normed).max() + 8 * EPS["float32"] * case.dim
    assert np.abs(out.astype(np.float64) - normed).max() <= tolerance


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case) -> None:
    check(reference, case)
