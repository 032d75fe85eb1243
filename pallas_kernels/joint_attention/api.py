"""`joint_attention`: one softmax over chosen entries of several caches, where an entry is its own
key and value (DeepSeek-V4, arXiv:2606.19348: a window of tokens and compressed entries).
"""

from collections.abc import Sequence

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.joint_attention import reference, triton_gpu

_attention = first_of(triton_gpu.joint_attention, reference.joint_attention)


def joint_attention(
    q_TNE: jax.Array,
    caches: Sequence[tuple[jax.Array, jax.Array]],
    sinks_N: jax.Array,
    num_tokens: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Return [T, N, E] in `q.dtype`.

    Each of `caches` is (pages [P, B, E or more], slots i32[T, k]). Query `t < num_tokens` attends
    to the first E values of the entries at `slots[t]`, which end with the first negative one, of
    all caches together; somewhere it has one at least. Nothing else is read. Scores are
    `q.entry * scale`; `sinks`, float32, are one logit more in each head's softmax, without a value.

    Rows past the last token are finite, otherwise unspecified. The bits of a row depend on its
    query and the entries at its slots, in their order. The work grows with the slots that are used.
    """
    return _attention(q_TNE, caches, sinks_N, num_tokens, scale=scale)
