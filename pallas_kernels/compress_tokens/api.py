"""`compress_tokens`: one entry for every few tokens, a weighted mean whose weights are a softmax
over these tokens, channel by channel (DeepSeek-V4, arXiv:2606.19348), over ragged sequences.

Tokens form groups of r, aligned to r. A step has of a group what lies in its part of the sequence:
a piece (`cut_into_pieces`). A softmax that the step leaves unfinished is a state: per channel the
largest score so far, the sum of weights relative to it, the weighted sum of values.

With two halves (`halves` = 2) a token's first channels go into the entry of the *next* group, its
second ones into that of its own; the two softmaxes are joined: an entry takes in 2 r tokens.
"""

import jax

from jengine.pallas_kernels.compress_tokens import reference, triton_gpu
from jengine.pallas_kernels.compress_tokens.pieces import Pieces, cut_into_pieces
from jengine.pallas_kernels.dispatch import first_of

__all__ = ["Pieces", "compress_tokens", "cut_into_pieces", "state_size"]

_compress = first_of(triton_gpu.compress_tokens, reference.compress_tokens)


def compress_tokens(
    values_TUH: jax.Array,
    scores_TUH: jax.Array,
    states_PE: jax.Array,
    slots_2S: jax.Array,
    pieces: Pieces,
    *,
    is_decode: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return (entries float32 [G, H] of the pieces, states).

    Values and scores are float32, of U = 1 or 2 halves. The entry of a piece is that of its group
    if the piece completes it (`pieces.last_row >= 0`), else unspecified but finite. A state is
    float32 [E], E = `state_size`; slots are as in `gated_delta`, unused ones may hold NaN, and
    `states` is consumed. `is_decode` promises that every sequence has one new token at most.

    The bits of an entry depend on its tokens only, not on how they were cut into steps.
    """
    return _compress(values_TUH, scores_TUH, states_PE, slots_2S, pieces, is_decode=is_decode)


def state_size(halves: int, channels: int) -> int:
    """Values of a state: the softmax of the group at hand, in each half, and that of the first half
    of the group before."""
    return 3 * channels * (1 if halves == 1 else 3)
