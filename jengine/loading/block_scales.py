"""Tensors whose blocks have scales of their own, as DeepSeek-V4 stores them: read as floats.

FP8 (e4m3) `X.weight` [out, in] has a scale for each 128 x 128 block, FP4 (e2m1, two in a byte, the
lower half first) one for each row and 32 inputs. Scales are powers of two (e8m0), or float32.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jengine.errors import LoadError
from jengine.loading.mxfp4 import dequantise as dequantise_fp4

if TYPE_CHECKING:
    from jengine.loading.checkpoint import TensorSource

WEIGHT, SCALE = ".weight", ".scale"
BLOCK = 128  # rows and columns of an FP8 block
FP4_BYTES = 16  # of 32 values, which share a scale


class BlockScaledSource:
    """A `TensorSource` in which `X.weight` and `X.scale` are one tensor `X.weight` f32[out, in]."""

    def __init__(self, tensors: "TensorSource") -> None:
        self._tensors = tensors
        names = set(tensors.names())
        self._scales = {
            name: scale
            for name in names
            if name.endswith(WEIGHT) and (scale := name.removesuffix(WEIGHT) + SCALE) in names
        }
        self._is_fp4 = {name for name in self._scales if self._is_packed(name)}

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
        if name in self._is_fp4:
            scale = self._tensors.read(self._scales[name], slice(start, stop))
            blocks = weight.view(np.uint8).reshape(len(weight), -1, FP4_BYTES)
            return dequantise_fp4(blocks, scale.view(np.uint8))
        first = start // BLOCK
        scale = self._tensors.read(self._scales[name], slice(first, -(-stop // BLOCK)))
        scale = np.repeat(scale.astype(np.float32), BLOCK, axis=1)[:, : weight.shape[1]]
        of_row = np.arange(start, stop) // BLOCK - first
        return weight.astype(np.float32) * scale[of_row]

    def _is_packed(self, name: str) -> bool:
        """By the shapes, which must be those of one of the two."""
        weight, scale = self._tensors.shape(name), self._tensors.shape(self._scales[name])
        if len(weight) == 2 and scale == (weight[0], weight[1] // FP4_BYTES):
            return weight[1] % FP4_BYTES == 0
        if len(weight) == 2 and scale == (-(-weight[0] // BLOCK), -(-weight[1] // BLOCK)):
            return False
        raise LoadError(
            f"tensor {self._scales[name]!r} has shape {scale}: neither a scale for each {BLOCK} x "
            f"{BLOCK} block of {name!r}, of shape {weight}, nor for each row and 32 inputs"
        )


def has_block_scales(hf_config: Mapping[str, Any]) -> bool:
    quantization = hf_config.get("quantization_config") or {}
    return (
        hf_config.get("model_type") == "deepseek_v4" and quantization.get("quant_method") == "fp8"
    )
