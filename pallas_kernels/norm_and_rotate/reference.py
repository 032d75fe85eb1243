"""Plain-JAX `norm_and_rotate`."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.rms_norm.api import rms_norm


def norm_and_rotate(
    x_TNH: jax.Array,
    cos_TR: jax.Array,
    sin_TR: jax.Array,
    num_tokens: jax.Array,
    *,
    eps: float,
) -> jax.Array:
    N, H = x_TNH.shape[1:]
    rows, ones_H = x_TNH.reshape(-1, H).astype(jnp.float32), jnp.ones((H,), jnp.float32)
    rows = rms_norm(rows, ones_H, eps=eps, num_tokens=num_tokens * N)
    return rotate_tail(rows.astype(x_TNH.dtype).reshape(x_TNH.shape), (cos_TR, sin_TR))


def rotate_tail(x_TNH: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """In float32, rounded to the dtype of `x`."""
    cos_TR, sin_TR = rotation
    still = x_TNH.shape[-1] - 2 * cos_TR.shape[-1]
    pairs = x_TNH[..., still:].astype(jnp.float32).reshape(*x_TNH.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_TR[:, None, :], sin_TR[:, None, :]
    rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    tail = rotated.reshape(*x_TNH.shape[:-1], -1).astype(x_TNH.dtype)
    return jnp.concatenate([x_TNH[..., :still], tail], axis=-1)
