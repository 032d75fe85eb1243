"""`gated_delta` for GPUs: sequences of one token side by side; the others in chunks, one by one."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.gated_delta.reference import (
    CHUNK,
    loop,
    one_chunk,
    one_token,
    read,
    write,
)
from jengine.pallas_kernels.platform import require_cuda


def gated_delta(
    q_TKH: jax.Array,
    k_TKH: jax.Array,
    v_TNV: jax.Array,
    log_decay_TN: jax.Array,
    beta_TN: jax.Array,
    states_PE: jax.Array,
    slots_2S: jax.Array,
    cu_q_lens_S1: jax.Array,
    *,
    is_decode: bool = False,
) -> tuple[jax.Array, jax.Array]:
    require_cuda()
    tokens = tuple(x.astype(jnp.float32) for x in (q_TKH, k_TKH, v_TNV, log_decay_TN, beta_TN))
    (T, N, V), H, S = v_TNV.shape, k_TKH.shape[2], slots_2S.shape[1]
    lens_S = cu_q_lens_S1[1:] - cu_q_lens_S1[:-1]
    firsts_S = jnp.minimum(cu_q_lens_S1[:-1], T - 1)
    single_2S = jnp.where((lens_S == 1)[None, :], slots_2S, -1)
    state_SNHV = read(states_PE, single_2S[0], slice(N * H * V)).reshape(S, N, H, V)
    singles = tokens if is_decode else tuple(x[firsts_S] for x in tokens)
    out_S1NV, state_SNHV = jax.vmap(one_token)(tuple(x[:, None] for x in singles), state_SNHV)
    states_PE = write(states_PE, single_2S[1], 0, state_SNHV.reshape(S, -1))
    if is_decode:
        return out_S1NV[:, 0], states_PE
    num_turns_S = jnp.where(lens_S > 1, -(-lens_S // CHUNK), 0)
    out_TNV, states_PE = loop(
        tokens, states_PE, slots_2S, cu_q_lens_S1, num_turns_S, CHUNK, lambda _: one_chunk
    )
    # Each sequence that is in the chunks gets a place past the end: places are declared unique.
    at_S = jnp.where(lens_S == 1, firsts_S, T + jnp.arange(S, dtype=jnp.int32))
    return out_TNV.at[at_S].set(out_S1NV[:, 0], mode="drop", unique_indices=True), states_PE
