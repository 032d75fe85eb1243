"""`kv_write` against numpy assignment, and that it works in the donated pages."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.kv_write import reference
from jengine.pallas_kernels.kv_write.cases import CASES, Case

OPERATION = "kv_write"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_assignment(backend: ModuleType, case: Case) -> None:
    pages, k, v, slots = case.build()
    pages, k, v = pages.astype(case.page_dtype), k.astype(case.new_dtype), v.astype(case.new_dtype)
    expected = pages.copy().reshape(-1, *pages.shape[2:])
    for t in range(case.num_tokens):
        if slots[t] >= 0:
            expected[slots[t]] = np.stack([k[t], v[t]]).astype(case.page_dtype)
    write = jax.jit(backend.kv_write, donate_argnums=0)
    out = write(jnp.asarray(pages), k, v, slots, np.int32(case.num_tokens))
    np.testing.assert_array_equal(np.asarray(out), expected.reshape(pages.shape))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_donated_pages_are_updated_in_place(backend: ModuleType, dtype: str) -> None:
    if backend is reference and dtype == "bfloat16" and jax.__version_info__ < (0, 11):
        pytest.xfail("XLA:CPU 0.10 widens bfloat16 updates: see `is_in_place`")
    pages = jnp.zeros((256, 16, 2, 3, 64), dtype)
    k, v, slots = map(jnp.asarray, Case(8, 8, num_pages=256, page_dtype=dtype).build()[1:])

    def two_layers(
        first: jax.Array, second: jax.Array, n: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return backend.kv_write(first, k, v, slots, n), backend.kv_write(second, k, v, slots, n)

    compiled = (
        jax.jit(two_layers, donate_argnums=(0, 1)).lower(pages, pages, jnp.int32(8)).compile()
    )
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    assert memory.alias_size_in_bytes == 2 * pages.nbytes
    assert memory.temp_size_in_bytes < pages.nbytes / 4
    shape = "bf16[256" if dtype == "bfloat16" else "f32[256"
    copies = [line for line in text.splitlines() if " copy(" in line and shape in line]
    assert not copies


def test_any_negative_slot_is_dropped(backend: ModuleType) -> None:
    pages, k, v, _ = Case(2, 2, num_pages=2, new_dtype="float32", page_dtype="float32").build()
    slots = jnp.array([-7, 3], jnp.int32)
    out = np.asarray(jax.jit(backend.kv_write)(pages, k, v, slots, np.int32(2)))
    changed = np.flatnonzero((out != pages).reshape(32, -1).any(axis=1))
    assert changed.tolist() == [3]
