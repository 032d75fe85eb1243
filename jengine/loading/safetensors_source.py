"""Tensors of a Hugging Face folder: one safetensors file, or several with an index."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # safetensors makes bfloat16 arrays only once it is imported
import numpy as np
from safetensors import SafetensorError, safe_open

from jengine.errors import LoadError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT8_DTYPES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
# Bytes and those of eight bits: what another source unpacks (mxfp4.py, block_scales.py).
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "I8", *FLOAT8_DTYPES)


class SafetensorsSource:
    """Reads slices; files are mapped, so only what is asked for is ever copied."""

    def __init__(self, folder: Path) -> None:
        self._slices: dict[str, Any] = {}
        for file, expected in _files(folder).items():
            for name, part in _open(file).items():
                if name in self._slices:
                    raise LoadError(f"tensor {name!r} is in two files of {folder}")
                if part.get_dtype() not in DTYPES:
                    raise LoadError(
                        f"tensor {name!r} has dtype {part.get_dtype()}; "
                        f"supported: {', '.join(DTYPES)}"
                    )
                self._slices[name] = part
            if missing := sorted(expected - self._slices.keys()):
                raise LoadError(
                    f"tensor {missing[0]!r} is not in {file.name}, though {INDEX_FILE} says so"
                )

    def names(self) -> Sequence[str]:
        return list(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> np.ndarray:
        part, rows = self._slices[name], rows or slice(None)
        return part[rows] if columns is None else part[rows, columns]


def has_safetensors(folder: Path) -> bool:
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def _files(folder: Path) -> dict[Path, set[str]]:
    """Files to open, each with the tensors that the index promises in it."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return {folder / SINGLE_FILE: set()}
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        files: dict[Path, set[str]] = {}
        for tensor, file in weight_map.items():
            files.setdefault(folder / Path(file).name, set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index} is not a valid index: {error!r}") from error
    return files


class _Float8Slice:
    """In the place of safetensors' own slices, which cannot make such arrays."""

    def __init__(self, file: Path, kind: str, shape: Sequence[int], start: int) -> None:
        self._file, self._kind, self._shape, self._start = file, kind, tuple(shape), start

    def get_dtype(self) -> str:
        return self._kind

    def get_shape(self) -> tuple[int, ...]:
        return self._shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        mapped = np.memmap(self._file, np.uint8, "r", self._start, self._shape)
        return np.array(mapped[rows]).view(FLOAT8_DTYPES[self._kind])


def _float8_slices(file: Path) -> dict[str, _Float8Slice]:
    """Of those tensors of a valid file that need one, from its header."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(size))
    return {
        name: _Float8Slice(file, part["dtype"], part["shape"], 8 + size + part["data_offsets"][0])
        for name, part in header.items()
        if part.get("dtype") in FLOAT8_DTYPES
    }


def _open(file: Path) -> dict[str, Any]:
    """Name -> lazy slice. The slices keep the file mapped."""
    try:
        handle = safe_open(file, framework="np")
        names = handle.keys()
        return {name: handle.get_slice(name) for name in names} | _float8_slices(file)
    except FileNotFoundError:
        raise LoadError(f"{file} is missing") from None
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{file} is not a readable safetensors file: {error}") from error
