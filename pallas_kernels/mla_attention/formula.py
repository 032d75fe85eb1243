"""`mla_attention` without loops over data, which can be differentiated: see `dispatch.py`."""

import jax

from jengine.pallas_kernels.ragged_paged_attention.formula import attend_whole


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
    return attend_whole(
        q_TNE,
        pages_PBE,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        num_seqs,
        split=lambda entries_LE: (entries_LE[None], entries_LE[None, :, :value_dim]),
        scale=scale,
    )
