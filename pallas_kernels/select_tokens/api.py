"""`select_tokens`: which tokens of its context each query attends to (the lightning indexer of
DeepSeek-V3.2, arXiv:2512.02556): those whose index keys score highest.
"""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.select_tokens import reference, triton_gpu

_select = first_of(triton_gpu.select_tokens, reference.select_tokens)


def select_tokens(
    q_TJX: jax.Array,
    weights_TJ: jax.Array,
    pages_PBE: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    top_k: int,
    scale: float,
    tokens_per_entry: int = 1,
) -> jax.Array:
    """Return the slots i32[T, k] of the tokens that each query attends to, in the order of their
    positions, then -1; k is `top_k`, or what a page table can hold if that is less.

    A token's index key is the last X values of its entry. It scores, for a query's J index heads,
    `sum_j weights[j] * relu(q[j].key * scale)`; of equal scores the earlier token is taken. A query
    at position p chooses from `0..p`, and takes all of them while p < k. Batch and pages are as in
    `mla_attention`: nothing but the index keys of contexts is read, unused slots may hold NaN.

    With more `tokens_per_entry` than one (DeepSeek-V4's compressed entries) the pages hold an entry
    for so many tokens, and a query at position p chooses from those that are complete by then,
    entries `0..(p + 1) // tokens_per_entry - 1`. There may be none. Lengths count tokens all the
    same.

    Scores are float32. Rows past the last token are unspecified. A row depends on its own sequence
    only, not on T, S, its neighbours or how the prompt was cut into chunks.
    """
    return _select(
        q_TJX,
        weights_TJ,
        pages_PBE,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        num_seqs,
        top_k=top_k,
        scale=scale,
        tokens_per_entry=tokens_per_entry,
    )
