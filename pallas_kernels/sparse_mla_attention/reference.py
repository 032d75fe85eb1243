"""Plain-JAX attention over chosen latents: a loop over tokens, each with flash attention over its
slots, in blocks of one shape for the same bits in every batch.
"""

import jax
import jax.numpy as jnp
from jax import lax

SLOT_BLOCK = 128


def sparse_mla_attention(
    q_TNE: jax.Array,
    pages_PBE: jax.Array,
    slots_Tk: jax.Array,
    num_tokens: jax.Array,
    *,
    value_dim: int,
    scale: float,
) -> jax.Array:
    T, N, _ = q_TNE.shape
    slots_Tk = pad_slots(slots_Tk)

    def run_token(t: jax.Array, out_TNC: jax.Array) -> jax.Array:
        empty = empty_softmax(N, value_dim)
        _, sum_N, acc_NV = accumulate(
            empty, q_TNE[t], pages_PBE, slots_Tk[t], value_dim=value_dim, scale=scale
        )
        out_NC = (acc_NV / jnp.where(sum_N == 0.0, 1.0, sum_N)[:, None]).astype(q_TNE.dtype)
        return lax.dynamic_update_slice_in_dim(out_TNC, out_NC[None], t, 0)

    num_rows = jnp.minimum(jnp.asarray(num_tokens, jnp.int32), T)
    return lax.fori_loop(0, num_rows, run_token, jnp.zeros((T, N, value_dim), q_TNE.dtype))


# Of each head: its largest score, the sum of weights relative to it, the weighted sum of values.
Softmax = tuple[jax.Array, jax.Array, jax.Array]


def empty_softmax(num_heads: int, value_dim: int) -> Softmax:
    zeros_N = jnp.zeros((num_heads,))
    return jnp.full((num_heads,), -jnp.inf), zeros_N, jnp.zeros((num_heads, value_dim))


def pad_slots(slots_Tk: jax.Array) -> jax.Array:
    """To whole blocks: dynamic slices clamp at the end of the array and would shift."""
    return jnp.pad(slots_Tk, ((0, 0), (0, -slots_Tk.shape[1] % SLOT_BLOCK)), constant_values=-1)


def accumulate(
    carry: Softmax,
    q_NE: jax.Array,
    pages_PBE: jax.Array,
    slots_k: jax.Array,
    *,
    value_dim: int,
    scale: float,
) -> Softmax:
    """The softmax over the entries at `slots` as well."""
    E, B, C = q_NE.shape[1], pages_PBE.shape[1], SLOT_BLOCK
    dtype = q_NE.dtype if q_NE.dtype == pages_PBE.dtype else jnp.dtype(jnp.float32)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None  # not TF32

    def product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(
            subscripts,
            a.astype(dtype),
            b.astype(dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def step(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        max_N, sum_N, acc_NV = carry
        slots_C = lax.dynamic_slice_in_dim(slots_k, block * C, C)
        is_used_C = slots_C >= 0
        at_C = jnp.maximum(slots_C, 0)
        entries_CE = pages_PBE[lax.div(at_C, jnp.int32(B)), lax.rem(at_C, jnp.int32(B)), :E]
        # What unused places read, the null page's first slot, may be NaN.
        entries_CE = jnp.where(is_used_C[:, None], entries_CE, jnp.zeros((), entries_CE.dtype))
        s_NC = scale * product("NE,CE->NC", q_NE, entries_CE)
        s_NC = jnp.where(is_used_C[None], s_NC, -jnp.inf)
        # A block that is run has at least one slot: its maximum is finite.
        new_max_N = jnp.maximum(max_N, s_NC.max(axis=-1))
        p_NC = jnp.exp(s_NC - new_max_N[:, None])
        decay_N = jnp.exp(max_N - new_max_N)
        pv_NV = product("NC,CV->NV", p_NC, entries_CE[:, :value_dim])
        return new_max_N, sum_N * decay_N + p_NC.sum(axis=-1), acc_NV * decay_N[:, None] + pv_NV

    num_used = jnp.sum(slots_k >= 0, dtype=jnp.int32)
    num_blocks = lax.div(num_used + (C - 1), jnp.int32(C))
    return lax.fori_loop(0, num_blocks, step, carry)
