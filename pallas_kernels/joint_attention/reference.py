"""Plain-JAX `joint_attention`: a loop over tokens, each with flash attention over the slots of one
cache after the other, as `sparse_mla_attention` does it with one.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jengine.pallas_kernels.sparse_mla_attention.reference import (
    accumulate,
    empty_softmax,
    pad_slots,
)


def joint_attention(
    q_TNE: jax.Array,
    caches: Sequence[tuple[jax.Array, jax.Array]],
    sinks_N: jax.Array,
    num_tokens: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    T, N, E = q_TNE.shape
    padded = [(pages_PBE, pad_slots(slots_Tk)) for pages_PBE, slots_Tk in caches]

    def run_token(t: jax.Array, out_TNE: jax.Array) -> jax.Array:
        softmax = empty_softmax(N, E)
        for pages_PBE, slots_Tk in padded:
            softmax = accumulate(
                softmax, q_TNE[t], pages_PBE, slots_Tk[t], value_dim=E, scale=scale
            )
        max_N, sum_N, acc_NE = softmax
        whole_max_N = jnp.maximum(max_N, sinks_N)
        decay_N = jnp.exp(max_N - whole_max_N)
        sum_N = sum_N * decay_N + jnp.exp(sinks_N - whole_max_N)
        out_NE = (acc_NE * (decay_N / sum_N)[:, None]).astype(q_TNE.dtype)
        return lax.dynamic_update_slice_in_dim(out_TNE, out_NE[None], t, 0)

    num_rows = jnp.minimum(jnp.asarray(num_tokens, jnp.int32), T)
    return lax.fori_loop(0, num_rows, run_token, jnp.zeros((T, N, E), q_TNE.dtype))
