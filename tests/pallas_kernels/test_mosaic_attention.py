"""The Mosaic GPU attention kernel in Pallas's interpreter: pages, masks, barriers, copies.

The interpreter has no product with an operand in registers, so the second product is done in plain
JAX here; on a GPU, `-m gpu` runs the whole kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.ragged_paged_attention.cases import LONG_CASES, Case
from tests.pallas_kernels.test_ragged_paged_attention import attend_float64, check

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernel and its interpreter need JAX 0.11"
)
QUERIES = 64


@pytest.mark.parametrize(
    "case",
    [
        Case(((64, 64),), heads=4, kv_heads=2, head_dim=128, padding_tokens=0),
        Case(((192, 301),), heads=4, kv_heads=2, head_dim=128, padding_tokens=0),
        Case(((128, 200),), heads=2, kv_heads=1, head_dim=64, page_size=32, padding_tokens=0),
    ],
    ids=str,
)
def test_interpreted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots past the end of the context hold NaN, and blocks reach past the table's end."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from jengine.pallas_kernels.ragged_paged_attention import mosaic_gpu, mosaic_kernels
    from jengine.pallas_kernels.ragged_paged_attention.work import Tiles

    def add_product(acc: Any, p: Any, v: Any, meanwhile: Any) -> Any:
        meanwhile()
        return acc + jnp.dot(p.astype(jnp.float32), v[...].astype(jnp.float32))

    monkeypatch.setattr(mosaic_kernels, "add_product", add_product)
    ((new, context),) = case.lens
    inputs = case.build()
    tiles = [(0, i * QUERIES, context - new + i * QUERIES, context) for i in range(new // QUERIES)]
    params = plgpu.InterpretGPUParams(uninitialized_memory="nan")
    with plgpu.force_gpu_interpret_mode(params):
        out = mosaic_gpu.attend_full_tiles(
            jnp.asarray(inputs.q_TNH, jnp.bfloat16),
            jnp.asarray(inputs.kv_pages_PB2KH, jnp.bfloat16),
            jnp.asarray(inputs.page_table_SM),
            Tiles(jnp.asarray(tiles, jnp.int32), jnp.asarray([len(tiles)], jnp.int32)),
            case.head_dim**-0.5,
        )
        got = np.asarray(out).astype(np.float64)
    expected = attend_float64(case, inputs)
    tolerance = 2.0**-8 * (np.abs(expected) + 1)
    assert np.all(np.abs(got - expected) <= tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_on_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from jengine.pallas_kernels.ragged_paged_attention import mosaic_gpu, triton_gpu

    monkeypatch.setattr(mosaic_gpu, "MIN_TOKENS", QUERIES)
    check(triton_gpu, case)
