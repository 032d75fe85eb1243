"""`latent_attention`, absorbed throughout: nothing is expanded token by token."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.linear_heads.api import linear_heads
from jengine.pallas_kernels.mla_attention.api import mla_attention


def latent_attention(
    q_TNH: jax.Array,
    entries_TE: jax.Array,
    pages_PBE: jax.Array,
    up_k_NCP: jax.Array,
    up_v_NVC: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    num_tokens: jax.Array,
    *,
    scale: float,
    is_decode: bool = False,
) -> jax.Array:
    del entries_TE  # read from the pages
    out_TNC = mla_attention(
        absorb(q_TNH, up_k_NCP, num_tokens),
        pages_PBE,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        num_seqs,
        value_dim=up_v_NVC.shape[2],
        scale=scale,
        is_decode=is_decode,
    )
    return linear_heads(out_TNC, up_v_NVC, num_tokens=num_tokens)


def absorb(q_TNH: jax.Array, up_k_NCP: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """[T, N, C + R]: queries to be compared with entries."""
    q_TNP, q_TNR = jnp.split(q_TNH, (up_k_NCP.shape[2],), axis=-1)
    q_TNC = linear_heads(q_TNP, up_k_NCP, num_tokens=num_tokens)
    return jnp.concatenate([q_TNC, q_TNR], axis=-1)
