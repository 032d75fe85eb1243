"""Attention over several caches at once against float64, with NaN in all that must not be read."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.joint_attention import reference
from jengine.pallas_kernels.joint_attention.cases import CASES, SPLIT, Case, Inputs

SCALE = 0.1
EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}
INTERPRETED = (CASES[1], CASES[4], SPLIT[0], SPLIT[2])
ON_DEVICE = (*CASES, *SPLIT)


def run(case: Case, inputs: Inputs, backend: ModuleType, rows: list[int]) -> np.ndarray:
    """Of these tokens, the padding last."""

    def attend(q, pages, slots, sinks, num_tokens):
        caches = list(zip(pages, slots, strict=True))
        return backend.joint_attention(q, caches, sinks, num_tokens, scale=SCALE)

    out = jax.jit(attend)(
        jnp.asarray(inputs.q_TNE[rows], case.dtype),
        [jnp.asarray(pages, case.page_dtype or case.dtype) for pages, _ in inputs.caches],
        [slots[rows] for _, slots in inputs.caches],
        inputs.sinks_N,
        np.int32(min(len(rows), inputs.num_tokens)),
    )
    assert out.dtype == case.dtype
    return np.asarray(out)


def check(backend: ModuleType, case: Case) -> np.ndarray:
    inputs = case.build()
    q = inputs.q_TNE
    out = run(case, inputs, backend, [*range(len(q))])
    assert np.isfinite(out.astype(np.float32)).all()
    wide_q, E = q.astype(case.dtype).astype(np.float64), q.shape[2]
    for t in range(inputs.num_tokens):
        rows = np.concatenate(
            [
                pages.astype(case.page_dtype or case.dtype)
                .astype(np.float64)
                .reshape(-1, pages.shape[2])[slots[t][slots[t] >= 0], :E]
                for pages, slots in inputs.caches
            ]
        )
        for n, sink in enumerate(inputs.sinks_N):
            scores = rows @ wide_q[t, n] * SCALE
            largest = max(scores.max(), sink)
            weights = np.exp(scores - largest)
            expected = weights @ rows / (weights.sum() + np.exp(sink - largest))
            error = np.abs(out[t, n].astype(np.float64) - expected)
            eps = EPS[case.dtype]
            assert (error <= eps * np.abs(expected) + 16 * eps).all(), (t, n, error.max())
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case) -> None:
    out = check(reference, case)
    # Whoever is beside them.
    np.testing.assert_array_equal(run(case, case.build(), reference, [4, 0, 2]), out[[4, 0, 2]])
