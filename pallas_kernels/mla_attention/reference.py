"""Plain-JAX attention over latents: the loops of `ragged_paged_attention`, with one KV head whose
values are the beginnings of its keys.
"""

import jax

from jengine.pallas_kernels.ragged_paged_attention.reference import attend_pages


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
    del is_decode  # the same code for both
    return attend_pages(
        q_TNE,
        pages_PBE,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        num_seqs,
        split=lambda entries_CE: (entries_CE[None], entries_CE[None, :, :value_dim]),
        kv_heads=1,
        value_dim=value_dim,
        scale=scale,
    )
