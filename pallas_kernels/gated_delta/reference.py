"""Plain-JAX `gated_delta` and `short_conv`.

The delta rule is a loop over pieces of sequences, each from the state that the last piece left. Its
trip count is data, so the work grows with the tokens that there are; and since each turn has the
same shapes, a row's bits do not depend on the bucket, which those of sums over a batch would.

A piece of one token goes through the recurrence, another through the chunk-wise form. With G the
running sum of a chunk's log decays and M[i, j] = beta_i (k_i k_j) exp(G_i - G_j) below the
diagonal, what its tokens write are the rows of U - W S, where S is the state before the chunk and
(I + M) [U, W] = beta [v, exp(G) k] (the WY form of arXiv:2412.06464, section 3.3).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 64
HIGHEST = lax.Precision.HIGHEST
# Of tokens [C, heads, ...] and a state [N, H, V]: (out [C, N, V], the state after them).
Turn = Callable[[tuple[jax.Array, ...], jax.Array], tuple[jax.Array, jax.Array]]


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
    tokens = (q_TKH, k_TKH, v_TNV, log_decay_TN, beta_TN)
    lens_S = cu_q_lens_S1[1:] - cu_q_lens_S1[:-1]
    if is_decode:
        return loop(tokens, states_PE, slots_2S, cu_q_lens_S1, lens_S, 1, lambda _: one_token)

    def turn(num_tokens: jax.Array) -> Turn:
        return lambda tokens, state: lax.cond(
            num_tokens == 1, first_token, one_chunk, tokens, state
        )

    return loop(tokens, states_PE, slots_2S, cu_q_lens_S1, -(-lens_S // CHUNK), CHUNK, turn)


def loop(
    tokens: tuple[jax.Array, ...],
    states_PE: jax.Array,
    slots_2S: jax.Array,
    cu_q_lens_S1: jax.Array,
    num_turns_S: jax.Array,
    size: int,
    turn: Callable[[jax.Array], Turn],
) -> tuple[jax.Array, jax.Array]:
    """So many turns of each sequence, of `size` tokens but for its last one. `turn` is told how
    many of its tokens are real; the others are zeros, which change no state."""
    T, N, V = tokens[2].shape
    H = tokens[1].shape[2]
    padded = [
        jnp.pad(x.astype(jnp.float32), ((0, size), *((0, 0) for _ in x.shape[1:]))) for x in tokens
    ]
    stops_S = jnp.cumsum(num_turns_S)

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out_TNV, states_PE = carry
        s = jnp.searchsorted(stops_S, i, side="right")
        nth = i - (stops_S[s] - num_turns_S[s])
        start = cu_q_lens_S1[s] + nth * size
        num_tokens = jnp.minimum(cu_q_lens_S1[s + 1] - start, size)
        is_real_C = jnp.arange(size, dtype=jnp.int32) < num_tokens

        def take(x: jax.Array) -> jax.Array:
            mask = is_real_C.reshape(size, *(1 for _ in x.shape[1:]))
            return jnp.where(mask, lax.dynamic_slice_in_dim(x, start, size), 0.0)

        slot = jnp.where(nth == 0, slots_2S[0, s], slots_2S[1, s])
        row = lax.dynamic_slice(states_PE, (jnp.maximum(slot, 0), 0), (1, N * H * V))
        state = jnp.where(slot >= 0, row, 0.0).reshape(N, H, V)
        # Without the barrier these would be fused into the turns of one bucket, not of another.
        pieces, state = lax.optimization_barrier((tuple(map(take, padded)), state))
        out_CNV, state = turn(num_tokens)(pieces, state)
        # The rows past the end belong to later sequences, which overwrite them.
        out_TNV = lax.dynamic_update_slice_in_dim(out_TNV, out_CNV, start, axis=0)
        at = (slots_2S[1, s], 0)
        return out_TNV, lax.dynamic_update_slice(states_PE, state.reshape(1, -1), at)

    out_TNV = jnp.zeros((T + size, N, V), jnp.float32)
    out_TNV, states_PE = lax.fori_loop(0, stops_S[-1], body, (out_TNV, states_PE))
    return out_TNV[:T], states_PE


def one_token(tokens: tuple[jax.Array, ...], state_NHV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The recurrence over one token."""
    q_KH, k_KH, v_NV, log_decay_N, beta_N = (x[0] for x in tokens)
    repeats = v_NV.shape[0] // k_KH.shape[0]
    q_NH1, k_NH1 = (jnp.repeat(x, repeats, axis=0)[:, :, None] for x in (q_KH, k_KH))
    state_NHV = state_NHV * jnp.exp(log_decay_N)[:, None, None]
    written_NV = beta_N[:, None] * (v_NV - jnp.sum(state_NHV * k_NH1, axis=1))
    state_NHV = state_NHV + k_NH1 * written_NV[:, None, :]
    return jnp.sum(state_NHV * q_NH1, axis=1)[None], state_NHV


def first_token(tokens: tuple[jax.Array, ...], state_NHV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`one_token` of the first of several; the others are padding."""
    out_1NV, state_NHV = one_token(tuple(x[:1] for x in tokens), state_NHV)
    return jnp.pad(out_1NV, ((0, tokens[0].shape[0] - 1), (0, 0), (0, 0))), state_NHV


def one_chunk(tokens: tuple[jax.Array, ...], state_NHV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chunk-wise form."""
    q_KCH, k_KCH, v_NCV, log_decay_NC, beta_NC = (jnp.swapaxes(x, 0, 1) for x in tokens)
    repeats, (C, V) = v_NCV.shape[0] // k_KCH.shape[0], v_NCV.shape[1:]
    sums_NC = jnp.cumsum(log_decay_NC, axis=1)
    grown_NC1 = jnp.exp(sums_NC)[:, :, None]
    is_past_CC = jnp.tril(jnp.ones((C, C), bool))
    gaps_NCC = sums_NC[:, :, None] - sums_NC[:, None, :]
    decay_NCC = jnp.exp(jnp.where(is_past_CC[None], gaps_NCC, -jnp.inf))

    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum("nch,ndh->ncd", a, b, precision=HIGHEST)

    kk_NCC = jnp.repeat(products(k_KCH, k_KCH), repeats, axis=0)
    qk_NCC = jnp.repeat(products(q_KCH, k_KCH), repeats, axis=0)
    q_NCH, k_NCH = (jnp.repeat(x, repeats, axis=0) for x in (q_KCH, k_KCH))
    system_NCC = beta_NC[:, :, None] * kk_NCC * decay_NCC
    right_side = beta_NC[:, :, None] * jnp.concatenate([v_NCV, grown_NC1 * k_NCH], axis=2)
    solved = lax.linalg.triangular_solve(
        system_NCC, right_side, left_side=True, lower=True, unit_diagonal=True
    )

    def times(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=HIGHEST)

    written_NCV = solved[:, :, :V] - times(solved[:, :, V:], state_NHV)
    out_NCV = times(grown_NC1 * q_NCH, state_NHV) + times(qk_NCC * decay_NCC, written_NCV)
    left_NC1 = jnp.exp(sums_NC[:, -1:] - sums_NC)[:, :, None]
    added_NHV = times(jnp.swapaxes(left_NC1 * k_NCH, 1, 2), written_NCV)
    return jnp.swapaxes(out_NCV, 0, 1), state_NHV * grown_NC1[:, -1:] + added_NHV


def short_conv(
    x_TC: jax.Array,
    weight_CW: jax.Array,
    states_PE: jax.Array,
    slots_2S: jax.Array,
    seq_ids_T: jax.Array,
    cu_q_lens_S1: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    (T, C), W = x_TC.shape, weight_CW.shape[1]
    x_TC, weight_CW = x_TC.astype(jnp.float32), weight_CW.astype(jnp.float32)
    first = states_PE.shape[1] - (W - 1) * C
    past_SWC = read(states_PE, slots_2S[0], slice(first, None)).reshape(-1, W - 1, C)
    starts_S, lens_S = cu_q_lens_S1[:-1], cu_q_lens_S1[1:] - cu_q_lens_S1[:-1]
    nth_T = jnp.arange(T, dtype=jnp.int32) - starts_S[seq_ids_T]  # in the sequence's part
    out_TC = jnp.zeros((T, C), jnp.float32)
    for j in range(W):
        back = W - 1 - j
        before_TC = jnp.pad(x_TC, ((back, 0), (0, 0)))[:T]
        old_TC = past_SWC[seq_ids_T, jnp.clip(nth_T + j, 0, W - 2)]
        out_TC += jnp.where((nth_T >= back)[:, None], before_TC, old_TC) * weight_CW[None, :, j]
    # The inputs to remember: the last W - 1 of the old ones and the new ones.
    nth_SW = lens_S[:, None] + jnp.arange(W - 1, dtype=jnp.int32)[None, :]
    new_SWC = x_TC[jnp.clip(starts_S[:, None] + nth_SW - (W - 1), 0, T - 1)]
    seqs_S1 = jnp.arange(lens_S.shape[0], dtype=jnp.int32)[:, None]
    old_SWC = past_SWC[seqs_S1, jnp.minimum(nth_SW, W - 2)]
    past_SWC = jnp.where((nth_SW >= W - 1)[:, :, None], new_SWC, old_SWC)
    past_SE = past_SWC.reshape(-1, (W - 1) * C)
    return out_TC, write(states_PE, slots_2S[1], first, past_SE)


def read(states_PE: jax.Array, slots_S: jax.Array, columns: slice) -> jax.Array:
    """These columns of the slots' rows; zeros for negative slots."""
    rows = states_PE[jnp.maximum(slots_S, 0), columns]
    return jnp.where((slots_S >= 0)[:, None], rows, 0.0)


def write(states_PE: jax.Array, slots_S: jax.Array, first: int, rows_SE: jax.Array) -> jax.Array:
    """The rows into the slots, from column `first` on; those of negative slots nowhere."""
    P, S = states_PE.shape[0], slots_S.shape[0]
    at_S = jnp.where(slots_S >= 0, slots_S, P + jnp.arange(S, dtype=jnp.int32))
    columns = slice(first, first + rows_SE.shape[1])
    return states_PE.at[at_S, columns].set(rows_SE, mode="drop", unique_indices=True)
