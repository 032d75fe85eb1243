"""`rotate_and_write` out of its parts: norms, rotation, `kv_write`."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jengine.pallas_kernels.kv_write.api import kv_write
from jengine.pallas_kernels.linear.reference import sum_of_parts
from jengine.pallas_kernels.rms_norm.api import rms_norm


def rotate_and_write(
    qkv_PTXH: jax.Array,
    cos_TR: jax.Array,
    sin_TR: jax.Array,
    kv_pages_PB2KH: jax.Array,
    slots_T: jax.Array,
    num_tokens: jax.Array,
    *,
    dtype: DTypeLike,
    q_norm_H: jax.Array | None = None,
    k_norm_H: jax.Array | None = None,
    eps: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    K = kv_pages_PB2KH.shape[3]
    qkv_TXH = sum_of_parts(qkv_PTXH, dtype)
    N = qkv_TXH.shape[1] - 2 * K
    qk_TXH = qkv_TXH[:, : N + K]
    if q_norm_H is not None and k_norm_H is not None:
        q_TNH = _norm_heads(qk_TXH[:, :N], q_norm_H, eps, num_tokens)
        k_TKH = _norm_heads(qk_TXH[:, N:], k_norm_H, eps, num_tokens)
        qk_TXH = jnp.concatenate([q_TNH, k_TKH], axis=1)
    qk_TXH = rotate(qk_TXH, cos_TR, sin_TR)
    k_TKH, v_TKH = qk_TXH[:, N:], qkv_TXH[:, N + K :]
    k_TKH, v_TKH = (x_TKH.astype(kv_pages_PB2KH.dtype) for x_TKH in (k_TKH, v_TKH))
    pages = kv_write(kv_pages_PB2KH, k_TKH, v_TKH, slots_T, num_tokens)
    return qk_TXH[:, :N], pages


def rotate(x_TNH: jax.Array, cos_TR: jax.Array, sin_TR: jax.Array) -> jax.Array:
    """Rotary position embedding (arXiv:2104.09864), in float32."""
    half = cos_TR.shape[-1]
    x1, x2, rest = jnp.split(x_TNH, (half, 2 * half), axis=-1)
    x1, x2 = x1.astype(jnp.float32), x2.astype(jnp.float32)
    cos, sin = cos_TR[:, None, :], sin_TR[:, None, :]
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x_TNH.dtype), rest], axis=-1)


def _norm_heads(
    x_TNH: jax.Array, weight_H: jax.Array, eps: float, num_tokens: jax.Array
) -> jax.Array:
    T, N, H = x_TNH.shape
    rows = rms_norm(x_TNH.reshape(T * N, H), weight_H, eps=eps, num_tokens=num_tokens * N)
    return rows.reshape(T, N, H)
