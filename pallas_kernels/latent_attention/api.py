"""`latent_attention`: multi-head latent attention (arXiv:2405.04434) from queries to values,
however it is computed: a head's keys and values may be expanded from the latents, or its query and
result projected instead (absorbed), so that it attends to the latents themselves.
"""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.latent_attention import reference, triton_gpu

_attention = first_of(triton_gpu.latent_attention, reference.latent_attention)


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
    """Return [T, N, V] in `q.dtype`.

    `entries` are this step's, latent (C) and rotated key (R) of each token, and lie in the pages
    already. Head n's key of a token is `latent @ up_k[n]` [P] and the rotated key, its value
    `up_v[n] @ latent`; a query is of P and R. The rest is as in `mla_attention`.
    """
    return _attention(
        q_TNH,
        entries_TE,
        pages_PBE,
        up_k_NCP,
        up_v_NVC,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        num_seqs,
        num_tokens,
        scale=scale,
        is_decode=is_decode,
    )
