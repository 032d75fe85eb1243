"""What a model name stands for: a folder, a .gguf file, a pulled name, a Hub id, or a config.json
alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from jengine.config import LoadFormat, ModelArgs
from jengine.errors import LoadError, ModelNotFoundError
from jengine.loading.converted import ConvertedWeights, is_converted
from jengine.loading.gguf_config import generation_config_from_gguf, hf_config_from_gguf
from jengine.loading.gguf_source import GGUFFile, GGUFSource
from jengine.loading.hub import fetch_from_hub, is_hub_id
from jengine.loading.pull import PULLABLE, pulled_path
from jengine.loading.quantization import open_quantised
from jengine.loading.safetensors_source import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsSource,
    has_safetensors,
)
from jengine.text.tokenizer import Tokenizer

GGUF_SUFFIX = ".gguf"


class TensorSource(Protocol):
    """Named tensors of a checkpoint, read by slices of rows (axis 0) and columns (axis 1)."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> np.ndarray:
        """A new array, or a view that must not be written to."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """An opened model: its configuration is read, its tensors are not. `dialect` says how tensors
    are named.
    """

    name: str
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    dialect: Literal["hf", "gguf", "converted", "dummy"]
    tensors: TensorSource | None  # None: dummy, or converted
    path: Path  # folder or .gguf file
    converted: ConvertedWeights | None = None
    gguf_metadata: Mapping[str, Any] | None = field(default=None, repr=False)

    def load_tokenizer(self, override: str | None = None) -> Tokenizer:
        """The model's tokenizer, or that of another model: anything `open_checkpoint` takes as a
        name.
        """
        if override is not None:
            path = _gguf_inside(resolve_model(override, needs_weights=False))
            return _load_tokenizer(
                path, GGUFFile(path).metadata if path.suffix == GGUF_SUFFIX else None
            )
        return _load_tokenizer(self.path, self.gguf_metadata)


def open_checkpoint(args: ModelArgs) -> Checkpoint:
    """Find the model and read its configuration, with `hf_overrides` applied.

    Raises `ModelNotFoundError` if the name leads nowhere, `LoadError` if what it leads to cannot be
    read.
    """
    is_dummy = args.load_format == "dummy"
    path = resolve_model(args.model, args.revision, needs_weights=not is_dummy)
    if path.name == "config.json":
        path = path.parent
    path = _gguf_inside(path)
    if path.suffix == GGUF_SUFFIX and path.is_file():
        return _open_gguf(args, path)
    if not path.is_dir():
        raise LoadError(f"{path} is neither a folder nor a {GGUF_SUFFIX} file")
    config = _read_json(path / "config.json")
    if config is None:
        raise LoadError(f"{path} holds no config.json")
    if is_converted(path) and not is_dummy:
        return _open_converted(args, path, config)
    tensors = None if is_dummy else _open_safetensors(path, args.load_format)
    hf_config, tensors = open_quantised({**config, **args.hf_overrides}, tensors, args)
    return Checkpoint(
        name=args.model,
        hf_config=hf_config,
        generation_config=_read_json(path / "generation_config.json") or {},
        dialect="dummy" if is_dummy else "hf",
        tensors=tensors,
        path=path,
    )


def resolve_model(name: str, revision: str | None = None, *, needs_weights: bool = True) -> Path:
    """The folder or file that a name stands for; downloads a Hub model that is not in the cache."""
    path = Path(name).expanduser()
    if path.exists():
        return path.absolute()
    if name in PULLABLE:
        if (pulled := pulled_path(name)) is not None:
            return pulled
        raise ModelNotFoundError(
            f"{name} has not been pulled to this machine: run 'jengine pull {name}'"
        )
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == GGUF_SUFFIX:
        raise ModelNotFoundError(f"{name} does not exist")
    if is_hub_id(name):
        return fetch_from_hub(name, revision, needs_weights=needs_weights)
    raise ModelNotFoundError(
        f"{name!r} is no folder, no {GGUF_SUFFIX} file, no Hub id (organisation/model) and none of "
        f"the models that 'jengine pull' knows: {', '.join(PULLABLE)}"
    )


def _open_gguf(args: ModelArgs, path: Path) -> Checkpoint:
    if args.load_format == "safetensors":
        raise LoadError(f"{path} is a GGUF file, but load_format is 'safetensors'")
    file = GGUFFile(path)
    is_dummy = args.load_format == "dummy"
    return Checkpoint(
        name=args.model,
        hf_config={**hf_config_from_gguf(file), **args.hf_overrides},
        generation_config=generation_config_from_gguf(file.metadata),
        dialect="dummy" if is_dummy else "gguf",
        tensors=None if is_dummy else GGUFSource(file),
        path=path,
        gguf_metadata=file.metadata,
    )


def _open_converted(args: ModelArgs, folder: Path, config: dict[str, Any]) -> Checkpoint:
    if args.load_format != "auto":
        raise LoadError(f"{folder} is a converted model, but load_format is {args.load_format!r}")
    return Checkpoint(
        name=args.model,
        hf_config={**config, **args.hf_overrides},
        generation_config=_read_json(folder / "generation_config.json") or {},
        dialect="converted",
        tensors=None,
        path=folder,
        converted=ConvertedWeights(folder),
    )


def _open_safetensors(folder: Path, load_format: LoadFormat) -> SafetensorsSource:
    if load_format == "gguf":
        raise LoadError(f"{folder} holds no {GGUF_SUFFIX} file, but load_format is 'gguf'")
    if not has_safetensors(folder):
        raise LoadError(
            f"{folder} holds no weights ({SINGLE_FILE} or {INDEX_FILE}); "
            "load_format 'dummy' makes random ones"
        )
    return SafetensorsSource(folder)


def _gguf_inside(path: Path) -> Path:
    """A folder with one GGUF file and no config.json stands for that file."""
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob(f"*{GGUF_SUFFIX}"))
        if len(files) > 1:
            raise LoadError(f"{path} holds {len(files)} {GGUF_SUFFIX} files: name one of them")
        if files:
            return files[0]
    return path


def _load_tokenizer(path: Path, gguf_metadata: Mapping[str, Any] | None) -> Tokenizer:
    if gguf_metadata is not None:
        return Tokenizer.from_gguf(gguf_metadata)
    return Tokenizer.from_folder(path)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} does not hold a JSON object")
    return value
