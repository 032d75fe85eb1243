"""Attention over chosen latents against float64, with NaN in all that must not be read, and batch
invariance.
"""

from dataclasses import replace
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.sparse_mla_attention import reference
from jengine.pallas_kernels.sparse_mla_attention.cases import CASES, Case, Inputs

EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}
SCALE = 0.1
# Widths that the Triton kernels take: without splits, and in several.
INTERPRETED = (
    CASES[1],
    CASES[3],
    Case((300, 20), 700, heads=20, value_dim=64, rope_dim=16, padding_tokens=1),
)
ON_DEVICE = (CASES[0], CASES[2], *CASES[5:], Case((2048, 5), 2048, 128, 512, 64, 128, 16, 200))


def run(case: Case, inputs: Inputs, backend: ModuleType = reference) -> np.ndarray:
    def attend(q, pages, slots, num_tokens):
        return backend.sparse_mla_attention(
            q, pages, slots, num_tokens, value_dim=case.value_dim, scale=SCALE
        )

    out = jax.jit(attend)(
        jnp.asarray(inputs.q_TNE, case.q_dtype),
        jnp.asarray(inputs.pages_PBE, case.page_dtype),
        inputs.slots_Tk,
        np.int32(inputs.num_tokens),
    )
    assert out.dtype == case.q_dtype
    return np.asarray(out)


def attend_float64(case: Case, inputs: Inputs) -> np.ndarray:
    """One query, one head at a time."""
    q_TNE = inputs.q_TNE.astype(case.q_dtype).astype(np.float64)
    rows = inputs.pages_PBE.astype(case.page_dtype).astype(np.float64)
    rows = rows.reshape(-1, rows.shape[-1])[:, : q_TNE.shape[2]]
    out = np.zeros((*q_TNE.shape[:2], case.value_dim))
    for t, count in enumerate(case.counts):
        entries = rows[inputs.slots_Tk[t, :count]]
        for n in range(case.heads):
            scores = entries @ q_TNE[t, n] * SCALE
            weights = np.exp(scores - scores.max())
            out[t, n] = weights @ entries[:, : case.value_dim] / weights.sum()
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case) -> None:
    check(reference, case)


def check(backend: ModuleType, case: Case) -> None:
    inputs = case.build()
    out = run(case, inputs, backend)
    used = len(case.counts)
    expected = attend_float64(case, inputs)[:used]
    # As for `mla_attention`: both bfloat16, probabilities are rounded to bfloat16 too.
    is_half = case.q_dtype == case.page_dtype == "bfloat16"
    tolerance = EPS[case.q_dtype] * np.abs(expected) + (
        EPS["bfloat16"] if is_half else 16 * EPS["float32"]
    )
    assert np.all(np.abs(out[:used].astype(np.float64) - expected) <= tolerance)
    assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_bits_of_a_row_do_not_depend_on_its_neighbours(case: Case) -> None:
    inputs = case.build()
    expected = run(case, inputs)
    for rows in ([3], [7, 0, 4], [5, 5, 5, 2, 1]):
        some = replace(
            inputs,
            q_TNE=inputs.q_TNE[rows],
            slots_Tk=np.pad(inputs.slots_Tk[rows], ((0, 0), (0, 200)), constant_values=-1),
            num_tokens=len(rows),
        )
        np.testing.assert_array_equal(run(case, some), expected[rows])


def test_no_tokens() -> None:
    case = CASES[0]
    out = run(case, replace(case.build(), num_tokens=0))
    assert np.isfinite(out.astype(np.float32)).all()
