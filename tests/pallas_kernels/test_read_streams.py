"""What blocks read of streams against float64, and a row's bits in any batch."""

from dataclasses import replace
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.read_streams import reference
from jengine.pallas_kernels.read_streams.cases import CASES, Case, Inputs

NORM_EPS = 1e-6
EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}
INTERPRETED = CASES
ON_DEVICE = (
    Case(1, 4096),
    Case(64, 4096),
    Case(600, 4096),
    Case(8, 7168),
    Case(9, 4096, 4, "float32"),
)


def run(case: Case, inputs: Inputs, backend: ModuleType) -> list[np.ndarray]:
    def read(streams, *weights):
        return backend.read_streams(
            streams, *weights, jnp.int32(len(streams)),
            iterations=case.iterations, eps=case.eps, norm_eps=NORM_EPS,
        )  # fmt: skip

    streams = jnp.asarray(inputs.streams_TCD, case.dtype)
    out = jax.jit(read)(streams, inputs.fn_RX, inputs.base_R, inputs.scale_3, inputs.norm_D)
    assert [x.dtype for x in out] == [case.dtype, "float32", "float32"]
    return [np.asarray(x) for x in out]


def check(backend: ModuleType, case: Case) -> None:
    inputs = case.build()
    x, post, mix = run(case, inputs, backend)
    streams = inputs.streams_TCD.astype(case.dtype).astype(np.float64)
    c = case.streams
    for t, of_token in enumerate(streams):
        v = of_token.reshape(-1)
        numbers = inputs.fn_RX.astype(np.float64) @ v / np.sqrt(np.mean(v * v) + NORM_EPS)
        numbers *= np.repeat(inputs.scale_3.astype(np.float64), [c, c, c * c])
        numbers += inputs.base_R
        gates = 1 / (1 + np.exp(-numbers))
        read = (gates[:c] + case.eps) @ of_token
        normed = read / np.sqrt(np.mean(read * read) + NORM_EPS) * inputs.norm_D
        # Values of size one to a few, rounded twice; sums are float32.
        eps = EPS[case.dtype]
        assert (
            np.abs(x[t].astype(np.float64) - normed).max() <= 2 * eps * np.abs(normed).max() + 1e-5
        )
        np.testing.assert_allclose(post[t], 2 * gates[c : 2 * c], atol=2e-5)
        powers = np.exp(numbers[2 * c :].reshape(c, c))
        m = powers / powers.sum(axis=1, keepdims=True) + case.eps
        m /= m.sum(axis=0, keepdims=True) + case.eps
        for _ in range(case.iterations - 1):
            m /= m.sum(axis=1, keepdims=True) + case.eps
            m /= m.sum(axis=0, keepdims=True) + case.eps
        np.testing.assert_allclose(mix[t], m, atol=2e-5)
    for rows in (slice(0, 1), slice(-2, None)):
        part = run(case, replace(inputs, streams_TCD=inputs.streams_TCD[rows]), backend)
        for got, whole in zip(part, (x, post, mix), strict=True):
            np.testing.assert_array_equal(got, whole[rows])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case) -> None:
    check(reference, case)
