"""Latent attention against float64, with keys and values expanded."""

from functools import partial
from types import ModuleType

import jax
import numpy as np
import pytest

from jengine.pallas_kernels.latent_attention import reference
from jengine.pallas_kernels.latent_attention.cases import CASES, Case
from tests.pallas_kernels.test_mla_attention import EPS, SCALE

INTERPRETED = CASES[:-1]  # decode steps are the reference's way


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case) -> None:
    check(reference, case)


def check(backend: ModuleType, case: Case) -> None:
    latents = case.latents
    given, q, entries, up_k, up_v = case.build()
    dtype, used = latents.q_dtype, sum(new for new, _ in latents.lens)

    def attend(*arrays):
        return backend.latent_attention(*arrays, scale=SCALE)

    arrays = [np.asarray(x, dtype) for x in (q, entries)]
    ups = [np.asarray(x, dtype) for x in (up_k, up_v)]
    pages = given.pages_PBE.astype(latents.page_dtype)
    out = jax.jit(attend)(
        *arrays, pages, *ups, given.page_table_SM, given.cu_q_lens_S1, given.kv_lens_S,
        np.int32(given.num_seqs), np.int32(used),
    )  # fmt: skip
    assert out.dtype == dtype
    out = np.asarray(out).astype(np.float64)
    expected = attend_float64(case, arrays[0], pages, *ups)[:used]
    # Rounded on the way: keys or queries, weights, values or results. Scores are of size sqrt(P).
    tolerance = 6 * EPS[dtype] * np.abs(expected).max() + 64 * EPS["float32"]
    error = np.abs(out[:used] - expected)
    assert error.max() <= tolerance, (error.max(), tolerance, error.max(axis=(1, 2)))
    assert np.isfinite(out).all()


def attend_float64(
    case: Case, q: np.ndarray, pages: np.ndarray, up_k: np.ndarray, up_v: np.ndarray
) -> np.ndarray:
    """One sequence, one head, one query at a time."""
    q, pages, up_k, up_v = (x.astype(np.float64) for x in (q, pages, up_k, up_v))
    given, latents = case.build()[0], case.latents
    out = np.zeros((*q.shape[:2], case.value_dim))
    for s, (new, length) in enumerate(latents.lens):
        at = np.arange(length)
        entries = pages[given.page_table_SM[s][at // latents.page_size], at % latents.page_size]
        latent, rope = np.split(entries, (latents.value_dim,), axis=1)
        for n in range(latents.heads):
            keys = np.concatenate([latent @ up_k[n], rope], axis=1)
            values = latent @ up_v[n].T
            for i in range(new):
                t, seen = given.cu_q_lens_S1[s] + i, length - new + i + 1
                scores = keys[:seen] @ q[t, n] * SCALE
                weights = np.exp(scores - scores.max())
                out[t, n] = weights @ values[:seen] / weights.sum()
    return out


def test_earlier_positions_matter() -> None:
    """An oracle that sees this step's tokens only is found out."""
    case = CASES[1]
    given, q, entries, up_k, up_v = case.build()
    lens = tuple((new, new) for new, _ in case.latents.lens)
    short = np.array([n for n, _ in lens] + [0] * case.latents.padding_seqs, np.int32)

    def attend(kv_lens: np.ndarray) -> np.ndarray:
        arrays = (q, entries, given.pages_PBE, up_k, up_v, given.page_table_SM, given.cu_q_lens_S1)
        numbers = (given.num_seqs, sum(n for n, _ in lens))
        out = jax.jit(partial(reference.latent_attention, scale=SCALE))(
            *arrays, kv_lens, *map(np.int32, numbers)
        )
        return np.asarray(out)

    assert np.abs(attend(given.kv_lens_S) - attend(short))[37].max() > 0.1
