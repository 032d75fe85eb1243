"""Tensors whose blocks have scales of their own, as DeepSeek stores them: as bytes for packed
parameters, or read as floats.

FP8 (e4m3) `X.weight` [out, in] has a scale for each 128 x 128 block, FP4 (e2m1, two in a byte, the
lower half first) one for each row and 32 inputs. Scales are powers of two (e8m0), or float32.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jengine.errors import LoadError
from jengine.loading.mxfp4 import GROUP, SCALE_BIAS
from jengine.loading.mxfp4 import dequantise as dequantise_fp4

if TYPE_CHECKING:
    from jengine.loading.checkpoint import TensorSource

WEIGHT, SCALE = ".weight", ".scale"
SCALES = (SCALE, ".weight_scale_inv")  # V4's name; V3's, which is no inverse either
BLOCK = 128  # rows and columns of an FP8 block


class ScaledTensors:
    """What is common to the two ways to read them: which tensors they are, and their scales."""

    def __init__(self, tensors: "TensorSource") -> None:
        self._tensors = tensors
        names = set(tensors.names())
        self._scales = {
            name: scale
            for name in names
            if name.endswith(WEIGHT)
            for suffix in SCALES
            if (scale := name.removesuffix(WEIGHT) + suffix) in names
        }
        self._is_fp4 = {name for name in self._scales if self._is_packed(name)}

    def _scales_of_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """One scale for each row and group of inputs."""
        if name in self._is_fp4:
            return self._tensors.read(self._scales[name], slice(start, stop))
        first = start // BLOCK
        scale = self._tensors.read(self._scales[name], slice(first, -(-stop // BLOCK)))
        return scale[np.arange(start, stop) // BLOCK - first]

    def _is_packed(self, name: str) -> bool:
        """By the shapes, which must be those of one of the two."""
        weight, scale = self._tensors.shape(name), self._tensors.shape(self._scales[name])
        if len(weight) == 2 and scale == (weight[0], -(-2 * weight[1] // GROUP)):
            return True
        if len(weight) == 2 and scale == (-(-weight[0] // BLOCK), -(-weight[1] // BLOCK)):
            return False
        raise LoadError(
            f"tensor {self._scales[name]!r} has shape {scale}: neither a scale for each {BLOCK} x "
            f"{BLOCK} block of {name!r}, of shape {weight}, nor for each row and {GROUP} inputs"
        )


class BlockScaledSource(ScaledTensors):
    """A `TensorSource` in which `X.weight` and its scales are one `X.weight` f32[out, in]."""

    def names(self) -> Sequence[str]:
        scales = set(self._scales.values())
        return [name for name in self._tensors.names() if name not in scales]

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._tensors.shape(name)
        return (shape[0], 2 * shape[1]) if name in self._is_fp4 else shape

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> np.ndarray:
        if name not in self._scales:
            return self._tensors.read(name, rows, columns)
        if columns is not None:
            return self.read(name, rows)[:, columns]
        start, stop, _ = (rows or slice(None)).indices(self._tensors.shape(name)[0])
        weight = self._tensors.read(name, slice(start, stop))
        scale = self._scales_of_rows(name, start, stop)
        if name in self._is_fp4:
            return dequantise_fp4(weight.view(np.uint8), scale.view(np.uint8))
        scale = np.repeat(scale.astype(np.float32), BLOCK, axis=1)[:, : weight.shape[1]]
        return weight.astype(np.float32) * scale


class PackedSource(ScaledTensors):
    """A `TensorSource` in which `X.weight` is u8[out, bytes], and `X.scale` has a row for each of
    them: u8[out, groups], exponents, or f32. See `pallas_kernels/packed.py`.
    """

    def __init__(self, tensors: "TensorSource", *, has_exponents: bool) -> None:
        """`has_exponents`: float32 scales must be powers of two, and become exponents."""
        super().__init__(tensors)
        self._has_exponents = has_exponents
        self._weights = {
            name.removesuffix(WEIGHT) + SCALE: name for name in self._scales
        }  # by our names of scales

    def names(self) -> Sequence[str]:
        scales = set(self._scales.values())
        return [*(n for n in self._tensors.names() if n not in scales), *self._weights]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._weights:
            return self._tensors.shape(name)
        weight = self._weights[name]
        groups = self._tensors.shape(self._scales[weight])[1]
        return self._tensors.shape(weight)[0], groups

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> np.ndarray:
        if name in self._scales:
            return self._tensors.read(name, rows, columns).view(np.uint8)
        if name not in self._weights:
            return self._tensors.read(name, rows, columns)
        weight = self._weights[name]
        start, stop, _ = (rows or slice(None)).indices(self._tensors.shape(weight)[0])
        scale = self._scales_of_rows(weight, start, stop)[:, columns or slice(None)]
        if scale.dtype.itemsize == 1:
            return scale.view(np.uint8)
        return exponents(scale, self._scales[weight]) if self._has_exponents else scale


def exponents(scale: np.ndarray, name: str) -> np.ndarray:
    """E8M0 of powers of two in float32."""
    fraction, exponent = np.frexp(scale.astype(np.float32))
    biased = exponent - 1 + SCALE_BIAS
    if (fraction != 0.5).any() or biased.min() < 0 or biased.max() > 2 * SCALE_BIAS:
        raise LoadError(f"tensor {name!r} has scales that are no powers of two")
    return biased.astype(np.uint8)
