"""Plain-JAX `compress_tokens`: every piece takes its tokens in one after the other, all pieces at
the same time.

In turn, because then it does not matter where a step cut the group: the softmax of the first i
tokens comes from the same operations, whether it was a state in between or not.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jengine.pallas_kernels.compress_tokens.pieces import Pieces
from jengine.pallas_kernels.gated_delta.reference import read, write

# (largest score, sum of weights, weighted sum of values), all of one shape.
Softmax = tuple[jax.Array, ...]


def compress_tokens(
    values_TUH: jax.Array,
    scores_TUH: jax.Array,
    states_PE: jax.Array,
    slots_2S: jax.Array,
    pieces: Pieces,
    *,
    is_decode: bool = False,
) -> tuple[jax.Array, jax.Array]:
    (_, U, H), S = values_TUH.shape, slots_2S.shape[1]
    old_S3QH = _read_states(states_PE, slots_2S[0], U, H)
    old = tuple(old_S3QH[pieces.seq, i] for i in range(3))  # [G, Q, H]
    is_begun_G11 = (pieces.is_first & (pieces.offset > 0))[:, None, None]
    nothing = _empty(old[0][:, :U].shape)
    begun = tuple(
        jnp.where(is_begun_G11, x[:, :U], none) for x, none in zip(old, nothing, strict=True)
    )
    # Without the barrier this would be fused into the loop of one shape, not of another.
    softmax = lax.optimization_barrier(begun)

    def take(i: jax.Array, softmax: Softmax) -> Softmax:
        row_G = pieces.row + i - pieces.offset
        is_mine_G = (i >= pieces.offset) & (i < pieces.offset + pieces.count)
        at_G = jnp.where(is_mine_G, row_G, 0)
        scores_GUH = scores_TUH[at_G]
        added = _join(softmax, (scores_GUH, jnp.ones_like(scores_GUH), values_TUH[at_G]))
        mask = is_mine_G[:, None, None]
        return tuple(jnp.where(mask, new, old) for new, old in zip(added, softmax, strict=True))

    if is_decode:  # one token each, at its piece's offset
        softmax = take(pieces.offset, softmax)
    else:
        softmax = lax.fori_loop(0, pieces.tokens_per_entry, take, softmax)
    softmax = lax.optimization_barrier(softmax)
    if U == 1:
        entries_GH = _mean(tuple(x[:, 0] for x in softmax))
        parts = softmax
    else:
        earlier = _first_half_before(softmax, old, pieces)
        own = tuple(x[:, 1] for x in softmax)
        entries_GH = _mean(_join(earlier, own))
        parts = tuple(
            jnp.concatenate([now, before[:, None]], axis=1)
            for now, before in zip(softmax, earlier, strict=True)
        )
    left_S3QH = jnp.stack([x[pieces.last_piece_S] for x in parts], axis=1)
    return entries_GH, write(states_PE, slots_2S[1], 0, left_S3QH.reshape(S, -1))


def _read_states(states_PE: jax.Array, slots_S: jax.Array, halves: int, H: int) -> jax.Array:
    """[S, 3, Q, H]: of each half, then of the first half of the group before; empty for negative
    slots."""
    Q = 1 if halves == 1 else 3
    states = read(states_PE, slots_S, slice(0, 3 * Q * H)).reshape(-1, 3, Q, H)
    empty = jnp.stack(_empty((slots_S.shape[0], Q, H)), axis=1)
    return jnp.where((slots_S >= 0)[:, None, None, None], states, empty)


def _first_half_before(softmax: Softmax, old: Softmax, pieces: Pieces) -> Softmax:
    """[G, H]: the first half of the group before each piece's: of the piece before, or of the
    state, where it is the group at hand if the step begins with a new one."""
    is_first_G1, is_new_G1 = pieces.is_first[:, None], (pieces.offset == 0)[:, None]
    return tuple(
        jnp.where(
            is_first_G1,
            jnp.where(is_new_G1, state[:, 0], state[:, 2]),
            jnp.roll(now[:, 0], 1, axis=0),
        )
        for now, state in zip(softmax, old, strict=True)
    )


def _empty(shape: tuple[int, ...]) -> Softmax:
    return jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape), jnp.zeros(shape)


def _join(a: Softmax, b: Softmax) -> Softmax:
    """Over the tokens of both. A token's own has its score, a sum of one, its value."""
    new_max = jnp.maximum(a[0], b[0])
    new_max = jnp.where(jnp.isfinite(new_max), new_max, 0.0)  # both are empty: of padding
    decay_a, decay_b = jnp.exp(a[0] - new_max), jnp.exp(b[0] - new_max)
    # Without the barrier XLA:CPU makes fused multiply-adds of these in some shapes only.
    products = (a[1] * decay_a, b[1] * decay_b, a[2] * decay_a, b[2] * decay_b)
    sum_a, sum_b, acc_a, acc_b = lax.optimization_barrier(products)
    return new_max, sum_a + sum_b, acc_a + acc_b


def _mean(softmax: Softmax) -> jax.Array:
    return softmax[2] / jnp.where(softmax[1] == 0.0, 1.0, softmax[1])
