"""Compiled executables, kept on disk: a restart with the same key compiles nothing.

<root>/<toolchain key>/meta.json             JAX, device, flags: what any program depends on
<root>/<toolchain key>/autotune/, jax/       XLA's tuning results; JAX's own cache
<root>/<toolchain key>/<program key>/meta.json      our sources and the model's shapes
<root>/<toolchain key>/<program key>/<pages>/<name> one executable
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jaxlib.version
from jax.experimental import serialize_executable

from jengine.config import xla_flags
from jengine.runtime.xla_options import Options

log = logging.getLogger(__name__)

META = "meta.json"
SOURCES = ("models", "runtime", "layers", "pallas_kernels", "sharding")


class ExecutableStore:
    """Serialised executables in one folder (None: nothing is kept). A damaged file counts as
    absent.
    """

    def __init__(self, folder: Path | None, devices: tuple[jax.Device, ...]) -> None:
        self.folder = folder
        self._devices = devices

    def inside(self, name: str) -> "ExecutableStore":
        """The store in a folder of this one."""
        return ExecutableStore(None if self.folder is None else self.folder / name, self._devices)

    def load(self, name: str, structure: tuple[Any, Any]) -> jax.stages.Compiled | None:
        """`structure` is (in_tree, out_tree) of the executable's call."""
        if (payload := self._read(name)) is None:
            return None
        if self._devices[0].platform == "gpu":
            _prepare_mosaic()
        try:
            return serialize_executable.deserialize_and_load(
                payload, *structure, execution_devices=self._devices
            )
        except (jax.errors.JaxRuntimeError, ValueError, pickle.UnpicklingError) as error:
            log.warning("executable %s cannot be loaded; compiling it again: %s", name, error)
            return None

    def save(self, name: str, compiled: jax.stages.Compiled) -> None:
        if self.folder is None:
            return
        try:
            payload, _, _ = serialize_executable.serialize(compiled)
            write_whole(self.folder / name, hashlib.sha256(payload).digest() + payload)
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            log.warning("executable %s could not be kept: %s", name, error)

    def size(self, name: str) -> int:
        """Bytes of the file; 0 if there is none."""
        if self.folder is None:
            return 0
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / name).stat().st_size
        return 0

    def recall(self, name: str) -> dict[str, Any] | None:
        """Small figures that `remember` wrote."""
        payload = self._read(name)
        return None if payload is None else json.loads(payload)

    def remember(self, name: str, figures: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        payload = json.dumps(figures, indent=1).encode()
        try:
            write_whole(self.folder / name, hashlib.sha256(payload).digest() + payload)
        except OSError as error:
            log.warning("%s could not be kept: %s", name, error)

    def _read(self, name: str) -> bytes | None:
        if self.folder is None:
            return None
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = content[:32], content[32:]
        if hashlib.sha256(payload).digest() != digest:
            log.warning("%s is damaged; making it again", name)
            return None
        return payload


class ProgramCache:
    """Finds or makes the executables of small jitted functions (see `loading.dummy.Compile`)."""

    def __init__(self, store: ExecutableStore) -> None:
        self._store = store
        self.num_compiled = 0

    def __call__(
        self, name: str, jitted: Any, arguments: Sequence[jax.ShapeDtypeStruct]
    ) -> Callable[..., jax.Array]:
        if self._store.folder is None:
            return jitted  # which keeps what it has compiled, for this process
        structure = jax.tree.structure((tuple(arguments), {})), jax.tree.structure(0)
        if (compiled := self._store.load(name, structure)) is None:
            compiled = jitted.lower(*arguments).compile()
            self._store.save(name, compiled)
            self.num_compiled += 1
        return compiled


@dataclasses.dataclass(frozen=True)
class Artifacts:
    """The folders of one toolchain under `root`; None: nothing is kept."""

    root: Path | None
    devices: tuple[jax.Device, ...]  # that a program runs on, in the order of ranks
    options: Options

    @functools.cached_property
    def toolchain(self) -> Path | None:
        return None if self.root is None else self._folder(self.root, self._toolchain_facts())

    def store(self, facts: Mapping[str, Any]) -> ExecutableStore:
        """The store of programs that depend on `facts` besides the toolchain."""
        if self.toolchain is None:
            return ExecutableStore(None, self.devices)
        return ExecutableStore(self._folder(self.toolchain, facts), self.devices)

    def key(self, facts: Mapping[str, Any]) -> str:
        """Of programs that depend on these facts, on any machine with the same toolchain."""
        content = json.dumps([self._toolchain_facts(), facts], sort_keys=True, default=repr)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def cache(self, name: str) -> Path | None:
        """A folder for a cache that keeps its own keys."""
        if self.toolchain is None:
            return None
        folder = self.toolchain / name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def _toolchain_facts(self) -> dict[str, Any]:
        return {
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "platform": self.devices[0].platform,
            "platform_version": jax.extend.backend.get_backend().platform_version,
            "device_kind": self.devices[0].device_kind,
            "device_count": jax.device_count(),
            "devices": [device.id for device in self.devices],
            "xla_flags": xla_flags(),
            "compiler_options": self.options,
            "enable_x64": jax.config.jax_enable_x64,
            "matmul_precision": jax.config.jax_default_matmul_precision,
        }

    def _folder(self, parent: Path, facts: Mapping[str, Any]) -> Path:
        content = json.dumps(facts, indent=1, sort_keys=True, default=repr)
        folder = parent / hashlib.sha256(content.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (folder / META).exists():
            write_whole(folder / META, content.encode())
        return folder


def write_whole(path: Path, content: bytes) -> None:
    """A reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@functools.cache
def _prepare_mosaic() -> None:
    """Importing Mosaic says where its runtime library lies. Who traces a kernel imports it; who
    loads an executable that holds one must, too.
    """
    importlib.import_module("jax.experimental.mosaic.gpu")


@functools.cache
def source_digest() -> str:
    """Digest of what programs are traced from, tuned figures included: an edit invalidates every
    executable.
    """
    folders = [
        Path(folder)
        for name in SOURCES
        for folder in importlib.import_module(f"jengine.{name}").__path__
    ]
    return _digest(path for folder in folders for path in sorted(folder.rglob("*")))


@functools.cache
def family_digest(module: str) -> str | None:
    """The same of the top-level package or module that brings a family. None for our own."""
    top = importlib.import_module(module.partition(".")[0])
    if top.__name__ == "jengine":
        return None
    if not hasattr(top, "__path__"):
        return _digest([Path(str(top.__file__))])
    return _digest(path for folder in top.__path__ for path in sorted(Path(folder).rglob("*")))


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix in (".py", ".json"):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
