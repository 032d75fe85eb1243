"""Attention over latents against float64, with NaN in all that must not be read, and batch
invariance.
"""

from dataclasses import replace
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.mla_attention import reference
from jengine.pallas_kernels.mla_attention.cases import CASES, Case, Inputs

EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}
SCALE = 0.1


def run(
    case: Case, inputs: Inputs, backend: ModuleType = reference, is_decode: bool = False
) -> np.ndarray:
    def attend(q, pages, table, cu, kv_lens, num_seqs):
        return backend.mla_attention(
            q, pages, table, cu, kv_lens, num_seqs,
            value_dim=case.value_dim, scale=SCALE, is_decode=is_decode,
        )  # fmt: skip

    out = jax.jit(attend)(
        jnp.asarray(inputs.q_TNE, case.q_dtype),
        jnp.asarray(inputs.pages_PBE, case.page_dtype),
        inputs.page_table_SM,
        inputs.cu_q_lens_S1,
        inputs.kv_lens_S,
        np.int32(inputs.num_seqs),
    )
    assert out.dtype == case.q_dtype
    return np.asarray(out)


def attend_float64(case: Case, inputs: Inputs) -> np.ndarray:
    """One query, one head at a time."""
    q_TNE = inputs.q_TNE.astype(case.q_dtype).astype(np.float64)
    pages = inputs.pages_PBE.astype(case.page_dtype).astype(np.float64)
    out = np.zeros((*q_TNE.shape[:2], case.value_dim))
    for s, (new, length) in enumerate(case.lens):
        for i in range(new):
            t, at = inputs.cu_q_lens_S1[s] + i, np.arange(length - new + i + 1)
            entries = pages[inputs.page_table_SM[s][at // case.page_size], at % case.page_size]
            for n in range(case.heads):
                scores = entries @ q_TNE[t, n] * SCALE
                weights = np.exp(scores - scores.max())
                out[t, n] = weights @ entries[:, : case.value_dim] / weights.sum()
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case) -> None:
    check(reference, case)


# Entries that the Triton kernels take, two of them decode steps in splits.
INTERPRETED = (
    *CASES[:5],
    Case(((1, 700), (1, 1), (1, 1500)), heads=16, padding_tokens=2, padding_seqs=2),
    Case(((1, 90),), heads=40, padding_tokens=0, padding_seqs=0, q_dtype="float32",
         page_dtype="float32"),
    CASES[-1],
)  # fmt: skip


def check(backend: ModuleType, case: Case) -> None:
    inputs = case.build()
    is_decode = all(new == 1 for new, _ in case.lens)
    out = run(case, inputs, backend, is_decode and len(inputs.q_TNE) == len(inputs.kv_lens_S))
    used = sum(new for new, _ in case.lens)
    expected = attend_float64(case, inputs)[:used]
    # Both bfloat16: probabilities are rounded to bfloat16 too. Values are of size one, so is the
    # sum of weights; in float32 an error of a score of a few tens counts too.
    is_half = case.q_dtype == case.page_dtype == "bfloat16"
    tolerance = EPS[case.q_dtype] * np.abs(expected) + (
        EPS["bfloat16"] if is_half else 16 * EPS["float32"]
    )
    assert np.all(np.abs(out[:used].astype(np.float64) - expected) <= tolerance)
    assert np.isfinite(out.astype(np.float32)).all()


INVARIANT = (
    Case(((130, 300),)),
    Case(((130, 300),), q_dtype="float32", page_dtype="float32"),
    Case(((130, 300),), heads=5, value_dim=40, rope_dim=8, q_dtype="float32"),
)


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_bits_of_a_row_do_not_depend_on_chunks_or_neighbours(case: Case) -> None:
    whole = case.build()
    expected = run(case, whole)[:130]
    done = 0
    for chunk in (1, 1, 2, 5, 16, 33, 1, 64, 7):
        # The chunk as the middle one of three sequences; the other two read the same pages at other
        # places.
        lens = ((3, 40), (chunk, 170 + done + chunk), (1, 290))
        cu = np.concatenate([[0], np.cumsum([new for new, _ in lens])]).astype(np.int32)
        q = np.random.default_rng(done).standard_normal(
            (cu[-1] + 5, *whole.q_TNE.shape[1:]), np.float32
        )
        q[3 : 3 + chunk] = whole.q_TNE[done : done + chunk]
        part = replace(
            whole,
            q_TNE=q,
            page_table_SM=np.repeat(whole.page_table_SM[:1], 3, axis=0),
            cu_q_lens_S1=cu,
            kv_lens_S=np.array([length for _, length in lens], np.int32),
            num_seqs=3,
        )
        np.testing.assert_array_equal(
            run(case, part)[3 : 3 + chunk],
            expected[done : done + chunk],
            err_msg=f"chunk {chunk} at {done}",
        )
        done += chunk
    assert done == 130


def test_no_sequences() -> None:
    case = Case(((1, 5),))
    out = run(case, replace(case.build(), num_seqs=0))
    assert np.isfinite(out.astype(np.float32)).all()
