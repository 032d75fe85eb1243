"""Attention over several caches at once against float64, with NaN in all that must not be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.joint_attention import reference
from jengine.pallas_kernels.sparse_mla_attention.cases import Case

SCALE = 0.1
EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}
WINDOW = (1, 7, 128, 128, 130, 3)


def case(counts: tuple[int, ...], dtype: str, page_size: int) -> Case:
    return Case(
        counts, 256, value_dim=24, rope_dim=8, page_size=page_size, num_pages=640 // page_size,
        q_dtype=dtype, page_dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("entries", [None, (0, 1, 129, 256, 0, 7)], ids=["window", "both"])
def test_equals_float64(dtype: str, entries: tuple[int, ...] | None) -> None:
    cases = [case(WINDOW, dtype, 16)] + ([case(entries, dtype, 4)] if entries else [])
    inputs = [c.build(seed) for seed, c in enumerate(cases)]
    q = inputs[0].q_TNE
    sinks = np.array([-30.0, 0.0, 2.0, 30.0], np.float32)  # of no weight, and of nearly all

    def attend(q, pages, slots, sinks, num_tokens):
        caches = list(zip(pages, slots, strict=True))
        return reference.joint_attention(q, caches, sinks, num_tokens, scale=SCALE)

    def run(rows: list[int]) -> np.ndarray:
        out = jax.jit(attend)(
            jnp.asarray(q[rows], dtype),
            [jnp.asarray(x.pages_PBE, dtype) for x in inputs],
            [x.slots_Tk[rows] for x in inputs],
            sinks,
            np.int32(min(len(rows), len(WINDOW))),
        )
        assert out.dtype == dtype
        return np.asarray(out)

    out = run([*range(len(q))])
    assert np.isfinite(out.astype(np.float32)).all()
    wide_q = q.astype(dtype).astype(np.float64)
    for t in range(len(WINDOW)):
        rows = np.concatenate(
            [
                x.pages_PBE.astype(dtype)
                .astype(np.float64)
                .reshape(-1, x.pages_PBE.shape[2])[x.slots_Tk[t][x.slots_Tk[t] >= 0], : q.shape[2]]
                for x in inputs
            ]
        )
        for n, sink in enumerate(sinks):
            scores = rows @ wide_q[t, n] * SCALE
            largest = max(scores.max(), sink)
            weights = np.exp(scores - largest)
            expected = weights @ rows / (weights.sum() + np.exp(sink - largest))
            error = np.abs(out[t, n].astype(np.float64) - expected)
            assert (error <= EPS[dtype] * np.abs(expected) + 16 * EPS[dtype]).all()
    np.testing.assert_array_equal(run([4, 0, 2]), out[[4, 0, 2]])  # whoever is beside them
