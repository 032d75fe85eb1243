"""Rotary positions of DeepSeek-V4: the last dimensions of a vector rotate, in pairs that lie side
by side. Since a token's vector is key and value at once, what attention returns is rotated back.
"""

import jax
import jax.numpy as jnp

Rotation = tuple[jax.Array, jax.Array]  # cos and sin, float32 [T, R / 2]


def rotate_tail(x_TNH: jax.Array, rotation: Rotation) -> jax.Array:
    """In float32, rounded to the dtype of `x`."""
    cos_TR, sin_TR = rotation
    still = x_TNH.shape[-1] - 2 * cos_TR.shape[-1]
    pairs = x_TNH[..., still:].astype(jnp.float32).reshape(*x_TNH.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_TR[:, None, :], sin_TR[:, None, :]
    rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    tail = rotated.reshape(*x_TNH.shape[:-1], -1).astype(x_TNH.dtype)
    return jnp.concatenate([x_TNH[..., :still], tail], axis=-1)


def inverse(rotation: Rotation) -> Rotation:
    return rotation[0], -rotation[1]
