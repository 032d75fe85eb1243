"""Ragged paged attention against float64, with NaN in all that must not be read, and batch
invariance.
"""

from dataclasses import replace
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.ragged_paged_attention.cases import CASES, Case, Inputs

OPERATION = "ragged_paged_attention"
EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}


def run(backend: ModuleType, case: Case, inputs: Inputs) -> np.ndarray:
    def attend(q, pages, table, cu, kv_lens, num_seqs, sinks):
        return backend.ragged_paged_attention(
            q,
            pages,
            table,
            cu,
            kv_lens,
            num_seqs,
            scale=case.head_dim**-0.5,
            window=case.window,
            soft_cap=case.soft_cap,
            sinks_N=sinks,
        )

    out = jax.jit(attend)(
        jnp.asarray(inputs.q_TNH, case.q_dtype),
        jnp.asarray(inputs.kv_pages_PB2KH, case.kv_dtype),
        inputs.page_table_SM,
        inputs.cu_q_lens_S1,
        inputs.kv_lens_S,
        np.int32(inputs.num_seqs),
        inputs.sinks_N,
    )
    assert out.dtype == case.q_dtype
    return np.asarray(out)


def attend_float64(case: Case, inputs: Inputs) -> np.ndarray:
    """One query, one head at a time."""
    q_TNH = inputs.q_TNH.astype(case.q_dtype).astype(np.float64)
    pages = inputs.kv_pages_PB2KH.astype(case.kv_dtype).astype(np.float64)
    out = np.zeros_like(q_TNH)
    group = case.heads // case.kv_heads
    for s, (new, length) in enumerate(case.lens):
        for i in range(new):
            t, position = inputs.cu_q_lens_S1[s] + i, length - new + i
            at = np.arange(
                0 if case.window is None else max(0, position - case.window + 1), position + 1
            )
            entries = pages[inputs.page_table_SM[s][at // case.page_size], at % case.page_size]
            for n in range(case.heads):
                scores = entries[:, 0, n // group] @ q_TNH[t, n] * case.head_dim**-0.5
                if case.soft_cap is not None:
                    scores = case.soft_cap * np.tanh(scores / case.soft_cap)
                weights = np.exp(scores - scores.max())
                total = weights.sum()
                if inputs.sinks_N is not None:
                    total += np.exp(inputs.sinks_N[n] - scores.max())
                out[t, n] = weights @ entries[:, 1, n // group] / total
    return out


INTERPRETED = (*CASES[:3], *CASES[4:7], *CASES[8:10], *CASES[11:14])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(backend: ModuleType, case: Case) -> None:
    check(backend, case)


def check(backend: ModuleType, case: Case) -> None:
    inputs = case.build()
    out = run(backend, case, inputs)
    used = sum(new for new, _ in case.lens)
    expected = attend_float64(case, inputs)[:used]
    # Both bfloat16: probabilities are rounded to bfloat16 too. Values are of size one, so is the
    # sum of weights.
    is_half = case.q_dtype == case.kv_dtype == "bfloat16"
    tolerance = EPS[case.q_dtype] * np.abs(expected) + (
        EPS["bfloat16"] if is_half else 8 * EPS["float32"]
    )
    assert np.all(np.abs(out[:used].astype(np.float64) - expected) <= tolerance)
    assert np.isfinite(out.astype(np.float32)).all()


INVARIANT = (
    Case(((130, 300),)),
    Case(((130, 300),), window=100, has_sinks=True, q_dtype="float32"),
    *(
        pytest.param(case, marks=pytest.mark.slow, id=str(case))
        for case in (
            Case(((130, 300),), q_dtype="float32", kv_dtype="float32"),
            Case(((130, 300),), window=50, heads=4, kv_heads=4),
            Case(((130, 300),), has_sinks=True, soft_cap=20.0, heads=8, kv_heads=1),
        )
    ),
)


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_bits_of_a_row_do_not_depend_on_chunks_or_neighbours(
    backend: ModuleType, case: Case
) -> None:
    whole = case.build()
    expected = run(backend, case, whole)[:130]
    done = 0
    for chunk in (1, 1, 2, 5, 16, 33, 1, 64, 7):
        # The chunk as the middle one of three sequences; the other two read the same pages at other
        # places.
        lens = ((3, 40), (chunk, 170 + done + chunk), (1, 290))
        cu = np.concatenate([[0], np.cumsum([new for new, _ in lens])]).astype(np.int32)
        q = np.random.default_rng(done).standard_normal(
            (cu[-1] + 5, *whole.q_TNH.shape[1:]), np.float32
        )
        q[3 : 3 + chunk] = whole.q_TNH[done : done + chunk]
        part = replace(
            whole,
            q_TNH=q,
            page_table_SM=np.repeat(np.maximum(whole.page_table_SM[:1], 1), 3, axis=0),
            cu_q_lens_S1=cu,
            kv_lens_S=np.array([length for _, length in lens], np.int32),
            num_seqs=3,
        )
        out = run(backend, case, part)[3 : 3 + chunk]
        np.testing.assert_array_equal(
            out, expected[done : done + chunk], err_msg=f"chunk {chunk} at {done}"
        )
        done += chunk
    assert done == 130


def test_no_sequences(backend: ModuleType) -> None:
    case = Case(((1, 5),))
    out = run(backend, case, replace(case.build(), num_seqs=0))
    assert np.isfinite(out.astype(np.float32)).all()


def test_unsupported_head_dims_are_left_to_the_reference() -> None:
    from jengine.pallas_kernels.ragged_paged_attention import api, cpu_ffi

    case = Case(
        ((4, 9), (1, 3)), heads=2, kv_heads=1, head_dim=20, q_dtype="float32", kv_dtype="float32"
    )
    with pytest.raises(NotImplementedError):
        run(cpu_ffi, case, case.build())
    out = run(api, case, case.build())[:5]
    np.testing.assert_allclose(out, attend_float64(case, case.build())[:5], atol=2e-6)
