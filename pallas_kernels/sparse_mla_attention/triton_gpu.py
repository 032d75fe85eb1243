"""Attention over chosen latents on NVIDIA GPUs: that of `joint_attention`, of one cache, without
sinks.
"""

import jax

from jengine.pallas_kernels.joint_attention.triton_gpu import attend


def sparse_mla_attention(
    q_TNE: jax.Array,
    pages_PBE: jax.Array,
    slots_Tk: jax.Array,
    num_tokens: jax.Array,
    *,
    value_dim: int,
    scale: float,
) -> jax.Array:
    caches = [(pages_PBE, slots_Tk)]
    return attend(q_TNE, caches, None, num_tokens, value_dim=value_dim, scale=scale)
