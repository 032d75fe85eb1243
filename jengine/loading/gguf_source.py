"""GGUF files: metadata, and tensors dequantised by the `gguf` library.

The header is parsed here because `gguf.GGUFReader` builds numpy views for every token and merge of
the vocabulary: 3.5 s against 0.1 s for a vocabulary of 49k. Format: ggml's docs/gguf.md, versions 2
and 3.
"""

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jengine.errors import LoadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
# GGUF value type -> struct format of one little-endian scalar
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}

Type = GGMLQuantizationType
TENSOR_TYPES = frozenset(
    {Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1}
    | {Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K}
)


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is row-major: the file's dimensions reversed."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int  # in the file

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of axis 0; of the whole tensor where it has one axis (blocks run along
        it).
        """
        block, size = GGML_QUANT_SIZES[self.type]
        row = self.shape[1:] if len(self.shape) > 1 else self.shape
        return math.prod(row) // block * size

    @property
    def num_bytes(self) -> int:
        return self.row_bytes * (self.shape[0] if len(self.shape) > 1 else 1)


class GGUFFile:
    """A mapped file: `metadata` by key, `tensors` by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise LoadError(f"{path} cannot be read: {error}") from error
        try:
            self.metadata, self.tensors = _parse(_Cursor(self.buffer))
        except (
            struct.error,
            UnicodeDecodeError,
            ValueError,
            KeyError,
            OverflowError,
            IndexError,
        ) as error:
            raise LoadError(f"{path} is not a readable GGUF file: {error}") from error
        for name, tensor in self.tensors.items():
            if tensor.type not in TENSOR_TYPES:
                known = ", ".join(sorted(t.name for t in TENSOR_TYPES))
                raise LoadError(f"tensor {name!r} has type {tensor.type.name}; supported: {known}")
            if tensor.offset + tensor.num_bytes > len(self.buffer):
                raise LoadError(
                    f"tensor {name!r} ends beyond the end of {path}: the file is cut short"
                )


class GGUFSource:
    """Dequantised rows, float32."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def names(self) -> Sequence[str]:
        return list(self._file.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[name].shape

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> np.ndarray:
        if columns is not None:  # blocks run along a row
            return self.read(name, rows)[:, columns]
        tensor = self._file.tensors[name]
        start, stop, _ = (rows or slice(None)).indices(tensor.shape[0])
        if len(tensor.shape) == 1:  # a norm or a bias: small
            return self._dequantize(tensor, tensor.offset, tensor.num_bytes, tensor.shape)[
                start:stop
            ]
        offset, num_bytes = (
            tensor.offset + start * tensor.row_bytes,
            (stop - start) * tensor.row_bytes,
        )
        return self._dequantize(tensor, offset, num_bytes, (stop - start, *tensor.shape[1:]))

    def _dequantize(
        self, tensor: GGUFTensor, offset: int, num_bytes: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        data = np.frombuffer(self._file.buffer, np.uint8, num_bytes, offset)
        if tensor.type in (Type.F32, Type.F16):  # the library takes these as numbers, not bytes
            data = data.view(np.float32 if tensor.type is Type.F32 else np.float16)
        return dequantize(data.reshape(math.prod(shape[:-1]), -1), tensor.type).reshape(shape)


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self.offset = 0

    def bytes(self, count: int) -> bytes:
        end = self.offset + count
        if end > len(self._buffer):
            raise ValueError("unexpected end of file")
        value = self._buffer[self.offset : end]
        self.offset = end
        return value

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}")
        return layout.unpack(self.bytes(layout.size))

    def uint(self, code: str) -> int:
        return self.scalars(code, 1)[0]

    def string(self) -> str:
        return self.bytes(self.uint("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalars(SCALARS[kind], 1)[0]
        kind, count = self.uint("I"), self.uint("Q")
        if kind in SCALARS:
            return list(self.scalars(SCALARS[kind], count))
        return [self.value(kind) for _ in range(count)]


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    if cursor.bytes(4) != MAGIC:
        raise ValueError("it does not start with 'GGUF'")
    if (version := cursor.uint("I")) not in VERSIONS:
        raise ValueError(
            f"version {version} is not supported (a big-endian file has a very large one)"
        )
    num_tensors, num_keys = cursor.uint("Q"), cursor.uint("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.uint("I"))
    found = []
    for _ in range(num_tensors):
        name = cursor.string()
        dims = cursor.scalars("Q", cursor.uint("I"))
        found.append((name, tuple(reversed(dims)), Type(cursor.uint("I")), cursor.uint("Q")))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    data_start = -(-cursor.offset // alignment) * alignment
    tensors = {
        name: GGUFTensor(shape, kind, data_start + offset) for name, shape, kind, offset in found
    }
    if len(tensors) != len(found):
        raise ValueError("two tensors have the same name")
    return metadata, tensors
