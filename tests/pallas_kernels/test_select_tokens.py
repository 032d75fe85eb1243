"""The choice of tokens against float64 and a stable sort, with NaN in all that must not be read,
and its independence of chunks and neighbours.
"""

from dataclasses import replace
from types import ModuleType
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.select_tokens import reference, triton_gpu
from jengine.pallas_kernels.select_tokens.cases import CASES, Case, Inputs

SCALE = 0.25
EPS = 2.0**-23
# One tile at a time, as few are where the ranks of all would take too much memory.
IN_TURNS = (
    Case(((5, 30), (1, 40)), top_k=3, tokens_per_entry=4),
    Case(((130, 300), (3, 90), (1, 200)), top_k=24),
)
# Contexts in chunks, one of them shorter than k; equal scores across chunks.
IN_CHUNKS = (
    Case(((1, 9000), (1, 3)), top_k=16, heads=1, dim=2),
    Case(((1, 9000), (1, 4100)), top_k=200, heads=2, dim=2, values=(-1.0, 0.0, 1.0)),
    Case(((1, 9000),), top_k=1000, heads=1, dim=2, values=(0.0,)),
)
INTERPRETED = (
    CASES[10],
    CASES[12],
    IN_TURNS[0],
    IN_CHUNKS[1],
    Case(((9, 30), (1, 64)), top_k=8, heads=2, dim=4, values=(-1.0, 0.0, 1.0)),
)
ON_DEVICE = (
    *CASES,
    *IN_TURNS,
    *IN_CHUNKS,
    # DeepSeek-V4's sizes, V3.2's, and a context of four chunks
    Case(((70, 9000), (1, 40000)), 512, 64, 128, 512, 32, "bfloat16", "bfloat16", (), 4),
    Case(((2, 3000), (1, 9000)), 2048, 64, 128, 576, 16, "bfloat16", "bfloat16"),
    Case(((1, 140000),), 512, 4, 16, 0, 32, "bfloat16", "bfloat16", (-1.0, 0.0, 1.0), 4),
)


def run(case: Case, inputs: Inputs, backend: ModuleType = reference) -> np.ndarray:
    def select(q, weights, pages, table, cu, kv_lens, num_seqs):
        return backend.select_tokens(
            q, weights, pages, table, cu, kv_lens, num_seqs, top_k=case.top_k, scale=SCALE,
            tokens_per_entry=case.tokens_per_entry,
        )  # fmt: skip

    slots = jax.jit(select)(
        jnp.asarray(inputs.q_TJX, case.q_dtype),
        inputs.weights_TJ,
        jnp.asarray(inputs.pages_PBE, case.page_dtype),
        inputs.page_table_SM,
        inputs.cu_q_lens_S1,
        inputs.kv_lens_S,
        np.int32(inputs.num_seqs),
    )
    assert slots.dtype == jnp.int32
    return np.asarray(slots)


def check_token(
    case: Case, inputs: Inputs, table: np.ndarray, t: int, position: int, slots: np.ndarray
) -> None:
    """The slots of one token: those of its best positions (or entries), in order."""
    at = np.arange((position + 1) // case.tokens_per_entry)
    keys = inputs.pages_PBE[table[at // case.page_size], at % case.page_size, case.other_dim :]
    keys = keys.astype(case.page_dtype).astype(np.float64)
    q = inputs.q_TJX[t].astype(case.q_dtype).astype(np.float64)
    scores = inputs.weights_TJ[t].astype(np.float64) @ np.maximum(q @ keys.T * SCALE, 0)
    k = min(case.top_k, len(at))
    best = np.argsort(-scores, kind="stable")
    used = slots[slots >= 0]
    if not k:
        assert not len(used)
        return
    assert len(used) == k and (slots[k:] == -1).all()
    expected = np.sort(best[:k])
    expected_slots = table[expected // case.page_size] * case.page_size + expected % case.page_size
    if np.array_equal(used, expected_slots):
        return
    # In float32 another order of sums may turn a near tie; nothing else.
    assert not case.values
    position_of = {table[p // case.page_size] * case.page_size + p % case.page_size: p for p in at}
    found = [position_of[slot] for slot in used]
    assert found == sorted(set(found))
    sizes = np.abs(inputs.weights_TJ[t]) @ (np.abs(q) @ np.abs(keys.T)) * SCALE
    margin = 8 * EPS * sizes.max() * (case.dim * case.heads) ** 0.5
    swapped = [*set(found) ^ {*expected.tolist()}]
    assert np.abs(scores[swapped] - scores[best[k - 1]]).max() <= margin


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_best_scores_in_order_of_positions(case: Case) -> None:
    check(reference, case)


def check(backend: ModuleType, case: Case) -> None:
    inputs = case.build()
    size, small = ("MAX_RANKS", 1) if case in IN_TURNS else ("MAX_PLACED", 512)
    with mock.patch.object(triton_gpu, size, small):  # the reference does not look at it
        slots = run(case, inputs, backend)
    capacity = inputs.page_table_SM.shape[1] * case.page_size
    assert slots.shape == (len(inputs.q_TJX), min(case.top_k, capacity))
    for s, (new, length) in enumerate(case.lens):
        for i in range(new):
            t = inputs.cu_q_lens_S1[s] + i
            check_token(case, inputs, inputs.page_table_SM[s], t, length - new + i, slots[t])


def test_order_of_floats() -> None:
    values = np.array([-np.inf, -3e38, -1.5, -1e-40, 0.0, 1e-40, 2e-3, 1.5, 3e38, np.inf])
    ranks = np.asarray(reference._order(jnp.asarray(values, jnp.float32)))
    # Numbers that are too small to be normal may count as 0.
    assert (np.diff(ranks[[0, 1, 2, 4, 6, 7, 8, 9]].astype(np.int64)) > 0).all()
    assert ranks.min() > 0
    zeros = np.asarray(reference._order(jnp.asarray([0.0, -0.0], jnp.float32)))
    assert zeros[0] == zeros[1]


INVARIANT = (
    Case(((130, 300),), top_k=24, heads=2, dim=4, values=(-1.0, 0.0, 1.0)),
    *(
        pytest.param(case, marks=pytest.mark.slow, id=str(case))
        for case in (
            Case(((130, 300),), top_k=24),
            Case(((130, 300),), top_k=200, q_dtype="bfloat16", page_dtype="bfloat16"),
        )
    ),
)


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_a_choice_does_not_depend_on_chunks_or_neighbours(case: Case) -> None:
    whole = case.build()
    expected, done = run(case, whole), 0
    for chunk in (1, 2, 5, 33, 1, 64, 24):
        # The chunk as the middle one of three sequences; the other two read the same pages.
        lens = ((3, 40), (chunk, 170 + done + chunk), (1, 290))
        cu = np.concatenate([[0], np.cumsum([new for new, _ in lens])]).astype(np.int32)
        rng = np.random.default_rng(done)
        q, weights = (
            rng.standard_normal((cu[-1] + 5, *x.shape[1:]), np.float32)
            for x in (whole.q_TJX, whole.weights_TJ)
        )
        q[3 : 3 + chunk] = whole.q_TJX[done : done + chunk]
        weights[3 : 3 + chunk] = whole.weights_TJ[done : done + chunk]
        part = replace(
            whole,
            q_TJX=q,
            weights_TJ=weights,
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
    case = Case(((1, 5),), top_k=3)
    assert (run(case, replace(case.build(), num_seqs=0)) == -1).all()
