"""`mla_attention`: causal attention over paged latents (arXiv:2405.04434), absorbed: every head
reads the same entry of a token, as its key and as its value.
"""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.mla_attention import formula, reference, triton_gpu

_attention = first_of(
    triton_gpu.mla_attention, reference.mla_attention, formula=formula.mla_attention
)


def mla_attention(
    q_TNE: jax.Array,
    pages_PBE: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    value_dim: int,
    scale: float,
    is_decode: bool = False,
) -> jax.Array:
    """Return [T, N, value_dim] in `q.dtype`.

    A token's key is its entry, its value the first `value_dim` of it. The rest is as in
    `ragged_paged_attention`: sequence `s < num_seqs` owns tokens `cu_q_lens[s]:cu_q_lens[s + 1]`;
    its last query stands at position `kv_lens[s] - 1`, and its entries (this step's included: write
    them first) lie in the pages of `page_table[s]`. A query at position p reads positions `0..p`.
    Nothing else is read: unused slots may hold NaN.

    Scores are `q.k * scale`. `is_decode` promises that every sequence has one new token. Rows past
    the last token are finite, otherwise unspecified. The bits of a row depend on its own sequence
    only, not on T, S, its neighbours or how the prompt was cut into chunks.
    """
    return _attention(
        q_TNE,
        pages_PBE,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        num_seqs,
        value_dim=value_dim,
        scale=scale,
        is_decode=is_decode,
    )
