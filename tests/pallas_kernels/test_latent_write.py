"""`latent_write` against numpy assignment, and that it works in the donated pages."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.latent_write import reference
from jengine.pallas_kernels.latent_write.cases import CASES, Case

OPERATION = "latent_write"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_assignment(backend: ModuleType, case: Case) -> None:
    pages, entries, slots = case.build()
    pages, entries = pages.astype(case.page_dtype), entries.astype(case.new_dtype)
    expected = pages.copy().reshape(-1, case.entry_dim)
    for t in range(case.num_tokens):
        if slots[t] >= 0:
            expected[slots[t]] = entries[t].astype(case.page_dtype)
    write = jax.jit(backend.latent_write, donate_argnums=0)
    out = write(jnp.asarray(pages), entries, slots, np.int32(case.num_tokens))
    np.testing.assert_array_equal(np.asarray(out), expected.reshape(pages.shape))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_donated_pages_are_updated_in_place(backend: ModuleType, dtype: str) -> None:
    if backend is reference and dtype == "bfloat16" and jax.__version_info__ < (0, 11):
        pytest.xfail("XLA:CPU 0.10 widens bfloat16 updates: see `kv_write.api.is_in_place`")
    pages = jnp.zeros((256, 16, 576), dtype)
    _, entries, slots = Case(8, 8, entry_dim=576).build()
    write = jax.jit(backend.latent_write, donate_argnums=0)
    compiled = write.lower(pages, entries, slots, jnp.int32(8)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == pages.nbytes
    assert memory.temp_size_in_bytes < pages.nbytes / 4


def test_odd_entries_are_left_to_the_reference() -> None:
    from jengine.pallas_kernels.latent_write import api, cpu_ffi

    pages, entries, slots = map(jnp.asarray, Case(2, 2, entry_dim=7).build())
    with pytest.raises(NotImplementedError):
        cpu_ffi.latent_write(pages, entries, slots, jnp.int32(2))
    out = jax.jit(api.latent_write)(pages, entries, slots, jnp.int32(2))
    np.testing.assert_array_equal(np.asarray(out).reshape(-1, 7)[slots], entries)
