"""MXFP4 tensors (OCP Microscaling formats 1.0), as gpt-oss stores its experts: read as floats."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jengine.loading.checkpoint import TensorSource

BLOCKS, SCALES = "_blocks", "_scales"
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, by its three bits
VALUES = np.array([*POSITIVE, *(-value for value in POSITIVE)], np.float32)
PAIRS = np.stack([np.tile(VALUES, 16), np.repeat(VALUES, 16)], axis=1)  # by byte: low nibble first
SCALE_BIAS = 127  # of E8M0
GROUP = 32  # values that share a scale


class Mxfp4Source:
    """A `TensorSource` in which `X_blocks` u8[E, out, G, 16] and `X_scales` u8[E, out, G] are one
    tensor `X` f32[E, 32 G, out], as checkpoints that are not quantised hold it.
    """

    def __init__(self, tensors: "TensorSource") -> None:
        self._tensors = tensors
        names = set(tensors.names())
        self._packed = {
            name.removesuffix(BLOCKS)
            for name in names
            if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in names
        }

    def names(self) -> Sequence[str]:
        parts = {name + part for name in self._packed for part in (BLOCKS, SCALES)}
        return [*(name for name in self._tensors.names() if name not in parts), *self._packed]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self._tensors.shape(name)
        experts, rows, groups, num_bytes = self._tensors.shape(name + BLOCKS)
        return experts, 2 * groups * num_bytes, rows

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> np.ndarray:
        if name not in self._packed:
            return self._tensors.read(name, rows, columns)
        if columns is not None:  # they are rows of the blocks
            return self.read(name, rows)[:, columns]
        blocks, scales = (self._tensors.read(name + part, rows) for part in (BLOCKS, SCALES))
        return dequantise(blocks.reshape(*blocks.shape[:2], -1), scales).swapaxes(1, 2)


def dequantise(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """f32[..., 2 n] of u8[..., n] and the power of two of each group of 32, of which the last may
    be smaller."""
    values = PAIRS[codes].reshape(*codes.shape[:-1], -1)
    powers = np.ldexp(np.float32(1.0), scales.astype(np.int32) - SCALE_BIAS)
    values *= np.repeat(powers, GROUP, axis=-1)[..., : values.shape[-1]]
    return values
