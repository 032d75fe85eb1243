"""`rotate_and_write` against float64 numpy."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.rotate_and_write import reference
from jengine.pallas_kernels.rotate_and_write.cases import CASES, Case

EPS = 1e-6
# One for each stage that rounds: sum, norm, scale, rotation, store.
ROUNDINGS = 5
INTERPRETED = CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case) -> None:
    check(reference, case)


def check(backend: ModuleType, case: Case) -> None:
    given = case.build()
    parts, pages = given.qkv_PTXH, given.kv_pages_PB2KH.astype(case.page_dtype)
    if case.parts == 1:
        parts = parts.astype(case.dtype)
    qkv = parts.astype(np.float64).sum(0)
    norms = None if given.norms_2H is None else given.norms_2H.astype(case.dtype)
    run = jax.jit(backend.rotate_and_write, static_argnames=("dtype", "eps"), donate_argnums=3)
    q, new_pages = run(
        parts, given.cos_TR, given.sin_TR, jnp.asarray(pages), given.slots_T,
        np.int32(case.num_tokens), dtype=case.dtype, eps=EPS,
        **({} if norms is None else dict(q_norm_H=norms[0], k_norm_H=norms[1])),
    )  # fmt: skip
    assert q.dtype == case.dtype and new_pages.dtype == pages.dtype
    rotated = expected_heads(qkv, given.cos_TR, given.sin_TR, case, norms)
    n = case.num_tokens
    assert_close(np.asarray(q)[:n], rotated[:n, : case.heads], case.dtype)
    assert np.isfinite(np.asarray(q).astype(np.float32)).all()
    slots, kept = given.slots_T[:n], given.slots_T[:n] >= 0
    flat = np.asarray(new_pages).reshape(-1, 2 * case.kv_heads, case.head_dim)
    worst = min(case.dtype, case.page_dtype, key=lambda d: jnp.finfo(d).bits)
    assert_close(flat[slots[kept]], rotated[:n][kept][:, case.heads :], worst)
    others = np.setdiff1d(np.arange(len(flat)), slots[kept])
    np.testing.assert_array_equal(flat[others], pages.reshape(flat.shape)[others])


def expected_heads(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, case: Case, norms: np.ndarray | None
) -> np.ndarray:
    """Number by number: [T, N + 2 K, H]."""
    out, half = x.copy(), cos.shape[1]
    for t in range(case.num_tokens):
        for head in range(case.heads + case.kv_heads):
            row = x[t, head]
            if norms is not None:
                weight = norms[0 if head < case.heads else 1].astype(np.float64)
                row = row / np.sqrt(np.mean(row**2) + EPS) * weight
            out[t, head] = row
            for i in range(half):
                turn = complex(cos[t, i], sin[t, i])
                pair = complex(row[i], row[i + half]) * turn
                out[t, head, i], out[t, head, i + half] = pair.real, pair.imag
    return out


def assert_close(got: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Errors are relative to the pair, whose parts may cancel; the largest number bounds it."""
    if expected.size:
        error = np.abs(got.astype(np.float64) - expected)
        assert error.max() <= ROUNDINGS * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
