"""Converted checkpoints: a model's parameters as the engine declares them, written by Orbax.

    FOLDER/jengine.json        format, and shape and dtype of every parameter; written last
    FOLDER/weights/<group>/    an Orbax checkpoint of parameters by path: those of one layer, ...
    FOLDER/config.json, ...    what is beside the weights of any checkpoint

Arrays are whole, fused and stacked as a model on one device has them, and not those of the ranks of
some mesh. Their chunks are plain files, so that any rank of any mesh reads its pieces of every
section and no byte more (docs/adr/0017).
"""

import functools
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 by name once it is imported)
import numpy as np

from jengine.errors import LoadError
from jengine.loading.arrays import aligned_empty, cast_into, numpy_dtype

if TYPE_CHECKING:
    from jengine.layers.param import ParamInfo  # imports jax

Pieces = tuple[tuple[slice, ...], ...]  # as in `rules`
Placed = TypeVar("Placed")

FORMAT = 1
MARKER = "jengine.json"
WEIGHTS = "weights"
# Of one file. Parts of it can be read; smaller ones are read by more threads at once.
CHUNK_BYTES = 32 << 20
MAX_THREADS = 8


def is_converted(folder: Path) -> bool:
    return (folder / MARKER).is_file()


class ConvertedWeights:
    """An opened folder. Raises `LoadError` if it is of another format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            marker = json.loads((folder / MARKER).read_text("utf-8"))
            self._format, self._parameters = marker["format"], dict(marker["parameters"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoadError(f"{folder / MARKER} cannot be read: {error}") from error
        if self._format != FORMAT:
            raise LoadError(
                f"{folder} was converted to format {self._format}, this version reads {FORMAT}: "
                "convert the model anew"
            )

    def check(self, abstract: Mapping[str, "ParamInfo"]) -> None:
        """Raises `LoadError` unless the folder holds these parameters in these shapes."""
        for path in sorted(abstract.keys() ^ self._parameters.keys()):
            where = "lacks" if path in abstract else "holds an unknown"
            raise LoadError(f"{self.folder} {where} parameter {path!r}: convert the model anew")
        for path, info in abstract.items():
            if (shape := tuple(self._parameters[path]["shape"])) != info.shape:
                raise LoadError(
                    f"parameter {path!r} has shape {shape} in {self.folder}, expected {info.shape}"
                )

    def array_folder(self, path: str) -> Path:
        return self.folder / WEIGHTS / group_of(path) / path

    @functools.cached_property
    def threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))), "weights")


class ConvertedReader:
    """Reads one parameter, or pieces of it: of mapped chunks only the bytes asked for, by several
    threads.
    """

    def __init__(self, weights: ConvertedWeights, path: str, info: "ParamInfo") -> None:
        self._threads, self._path, self._info = weights.threads, path, info
        self._stored = _Chunks(weights.array_folder(path), info.shape)

    def __call__(self, pieces: Pieces | None = None) -> np.ndarray:
        """A new array: for each dimension the pieces side by side, by default all of it."""
        pieces = pieces or tuple((slice(0, size),) for size in self._info.shape)
        shape = tuple(sum(p.stop - p.start for p in along) for along in pieces)
        value = aligned_empty(shape, numpy_dtype(self._info.dtype))

        def copy(parts: tuple[_Part, ...]) -> None:
            chunk = self._stored.open(tuple(part.chunk for part in parts))
            source = chunk[tuple(part.source for part in parts)]
            target = value[tuple(part.target for part in parts)]
            if source.dtype == target.dtype:  # as bytes: numpy keeps the lock for other dtypes
                source, target = (a.view(f"u{a.dtype.itemsize}") for a in (source, target))
            cast_into(target, source, self._path)

        along = [list(_parts(p, n)) for p, n in zip(pieces, self._stored.chunk_shape, strict=True)]
        for done in self._threads.map(copy, itertools.product(*along)):
            del done  # raises what a thread has raised
        return value


class _Part(NamedTuple):
    """Of one dimension: what comes from one chunk in one go."""

    chunk: int
    source: slice  # in the chunk
    target: slice


def _parts(pieces: tuple[slice, ...], chunk_size: int) -> Iterator[_Part]:
    place = 0
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            chunk, first = divmod(start, chunk_size)
            size = min(piece.stop - start, chunk_size - first)
            yield _Part(chunk, slice(first, first + size), slice(place, place + size))
            start, place = start + size, place + size


class _Chunks:
    """An uncompressed Zarr array (version 2): each chunk is a file of plain bytes."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        """Raises `LoadError` unless it has this shape."""
        self._folder = folder
        # Kept: the next rank asks for other bytes of the same pages.
        self._open: dict[tuple[int, ...], np.ndarray] = {}
        try:
            about = json.loads((folder / ".zarray").read_text("utf-8"))
            self.chunk_shape: tuple[int, ...] = tuple(about["chunks"])
            self._dtype = np.dtype(about["dtype"])
            plain = about["compressor"], about["filters"], about["order"], about["zarr_format"]
            is_plain = plain == (None, None, "C", 2) and tuple(about["shape"]) == shape
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoadError(f"{folder} cannot be read: {error}") from error
        if not is_plain:
            raise LoadError(f"{folder} is no plain array of shape {shape}: {about}")

    def open(self, index: tuple[int, ...]) -> np.ndarray:
        """Of these chunks; those at the edges are stored whole."""
        if (chunk := self._open.get(index)) is not None:
            return chunk
        file = self._folder / ".".join(map(str, index))
        try:
            chunk = self._open[index] = np.memmap(file, self._dtype, "r", shape=self.chunk_shape)
            return chunk
        except (OSError, ValueError) as error:
            raise LoadError(f"{file} cannot be read: {error}") from error


def load_converted(
    weights: ConvertedWeights,
    abstract: Mapping[str, "ParamInfo"],
    put: Callable[[str, ConvertedReader], Placed],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Placed]:
    """As `rules.load_parameters`."""
    weights.check(abstract)
    total, done = sum(info.num_bytes for info in abstract.values()), 0
    progress(done, total)
    parameters = {}
    for path, info in abstract.items():
        parameters[path] = put(path, ConvertedReader(weights, path, info))
        done += info.num_bytes
        progress(done, total)
    return parameters


class ConvertedWriter:
    """Writes parameters that come group by group: no more than one group is in memory."""

    def __init__(self, folder: Path) -> None:
        """Raises `LoadError` if there is something already."""
        if folder.exists() and any(folder.iterdir()):
            raise LoadError(f"{folder} is not empty")
        self.folder = folder
        (folder / WEIGHTS).mkdir(parents=True, exist_ok=True)
        self._group = ""
        self._values: dict[str, np.ndarray] = {}
        self._parameters: dict[str, dict[str, Any]] = {}
        self._written: set[str] = set()

    def put(self, path: str, value: np.ndarray) -> None:
        if (group := group_of(path)) != self._group:
            self._flush()
            self._group = group
        self._values[path] = value
        self._parameters[path] = {"shape": list(value.shape), "dtype": str(value.dtype)}

    def close(self) -> None:
        """The folder is whole after this."""
        self._flush()
        marker = {"format": FORMAT, "parameters": self._parameters}
        (self.folder / MARKER).write_text(json.dumps(marker, indent=1), "utf-8")

    def _flush(self) -> None:
        if not self._values:
            return
        assert self._group not in self._written, "parameters of one group come together"
        self._written.add(self._group)
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of what is off on purpose
        # Plain files, of which any bytes can be mapped: see `_Chunks`.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=False)
        arguments = {path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for path in self._values}
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(
                (self.folder / WEIGHTS / self._group).absolute(),
                args=ocp.args.PyTreeSave(self._values, save_args=arguments),
            )
        self._values = {}


def group_of(path: str) -> str:
    """The layer that a parameter belongs to, or the module beside them."""
    first, _, rest = path.partition(".")
    index = rest.partition(".")[0]
    return f"{first}.{index}" if index.isdecimal() else first
