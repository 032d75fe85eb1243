"""`kv_write` in C++ (`native/src/kv_write.cc`), in place."""

import jax


def kv_write(
    kv_pages_PB2KH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    slots_T: jax.Array,
    num_tokens: jax.Array,
) -> jax.Array:
    raise NotImplementedError
