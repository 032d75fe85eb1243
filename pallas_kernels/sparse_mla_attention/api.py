"""`sparse_mla_attention`: `mla_attention` over chosen tokens of each query's context only."""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.sparse_mla_attention import reference, triton_gpu

_attention = first_of(triton_gpu.sparse_mla_attention, reference.sparse_mla_attention)


def sparse_mla_attention(
    q_TNE: jax.Array,
    pages_PBE: jax.Array,
    slots_Tk: jax.Array,
    num_tokens: jax.Array,
    *,
    value_dim: int,
    scale: float,
) -> jax.Array:
    """Return [T, N, value_dim] in `q.dtype`.

    Query `t < num_tokens` attends to the entries in `slots[t]`, which end with the first negative
    one: `select_tokens` gives them. A token's key is the first E values of its entry, as many as a
    query has, its value the first `value_dim`; an entry may be longer. Nothing else is read.

    Scores are `q.k * scale`. Rows past the last token are finite, otherwise unspecified. The bits
    of a row depend on its query and the entries at its slots, in their order. The work grows with
    the slots that are used.
    """
    return _attention(q_TNE, pages_PBE, slots_Tk, num_tokens, value_dim=value_dim, scale=scale)
