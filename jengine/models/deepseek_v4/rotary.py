"""Rotary positions of DeepSeek-V4: the last dimensions of a vector rotate, in pairs that lie side
by side. Since a token's vector is key and value at once, what attention returns is rotated back.
"""

import jax

from jengine.pallas_kernels.norm_and_rotate.reference import rotate_tail

__all__ = ["Rotation", "inverse", "rotate_tail"]

Rotation = tuple[jax.Array, jax.Array]  # cos and sin, float32 [T, R / 2]


def inverse(rotation: Rotation) -> Rotation:
    return rotation[0], -rotation[1]
