"""`gated_delta` and `short_conv`: the two parts of a Gated DeltaNet layer (arXiv:2412.06464) that
remember, over ragged sequences whose states lie in slots.

A slot is one row of `states [P, E]`, float32: the matrices [N, H, V] of the delta rule, then the
last W - 1 inputs [W - 1, C] of the convolution. `slots[0]` says where a sequence's state is read
(negative: it begins, and its state is zero), `slots[1]` where it is left (negative exactly if it
has no tokens); no two sequences leave theirs in one slot, and none reads where another writes.
Nothing else is read or written: unused slots may hold NaN. Both operations consume `states`.

Sequence `s` owns tokens `cu_q_lens[s]:cu_q_lens[s + 1]`. Rows past the last token are finite,
otherwise unspecified. The bits of a row depend on its own sequence, its state and how it was cut
into steps, not on T, S or its neighbours.
"""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.gated_delta import reference, xla_gpu

_delta = first_of(xla_gpu.gated_delta, reference.gated_delta)
_conv = first_of(reference.short_conv)


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
    """Return (out [T, N, V], states), all in float32. For each token, with the key head of its
    value head, N / K of which share one:

        state = exp(log_decay) state
        state = state + k (beta (v - k state))
        out = q state

    `is_decode` promises that every sequence has one new token: token `s` is that of sequence `s`.
    """
    return _delta(
        q_TKH,
        k_TKH,
        v_TNV,
        log_decay_TN,
        beta_TN,
        states_PE,
        slots_2S,
        cu_q_lens_S1,
        is_decode=is_decode,
    )


def short_conv(
    x_TC: jax.Array,
    weight_CW: jax.Array,
    states_PE: jax.Array,
    slots_2S: jax.Array,
    seq_ids_T: jax.Array,
    cu_q_lens_S1: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return (out float32 [T, C], states): each channel's weighted sum of its last W inputs,
    `out[t] = sum_j weight[j] x[t - W + 1 + j]`. Inputs before a sequence's are zero.
    """
    return _conv(x_TC, weight_CW, states_PE, slots_2S, seq_ids_T, cu_q_lens_S1)
