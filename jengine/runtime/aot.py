"""Compiled executables, kept on disk: a restart with the same key compiles nothing."""

import contextlib
import hashlib
import importlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from jax.experimental import serialize_executable

from jengine.pallas_kernels.native import loader as native

log = logging.getLogger(__name__)


def executable_key(device: jax.Device, *parts: Any) -> str:
    """Digest of everything an executable depends on: our code, the arguments, jax, the device and
    its flags.
    """
    digest = hashlib.sha256()
    facts = (
        _source_digest(),
        jax.__version__,
        jaxlib.version.__version__,
        device.platform,
        device.device_kind,
        jax.device_count(),
        native.fingerprint(),
        *parts,
    )
    for fact in facts:
        digest.update(repr(fact).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]


class ExecutableStore:
    """Serialised executables in a folder, under one key. A damaged file counts as absent."""

    def __init__(self, folder: Path | None, key: str, device: jax.Device) -> None:
        self._device = device
        self._folder = None if folder is None else folder / key
        self.num_compiled = 0

    def get(
        self,
        name: str,
        structure: tuple[Any, Any],
        compile_: Callable[[], jax.stages.Compiled],
    ) -> jax.stages.Compiled:
        """Load `name`, or compile and keep it. `structure` is (in_tree, out_tree) of the
        executable's call.
        """
        if (compiled := self._load(name, structure)) is not None:
            return compiled
        compiled = compile_()
        self.num_compiled += 1
        self._save(name, compiled)
        return compiled

    def _load(self, name: str, structure: tuple[Any, Any]) -> jax.stages.Compiled | None:
        if self._folder is None:
            return None
        try:
            payload = (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = payload[:32], payload[32:]
        if hashlib.sha256(payload).digest() != digest:
            log.warning("executable %s is damaged; compiling it again", name)
            return None
        return serialize_executable.deserialize_and_load(
            payload, *structure, execution_devices=[self._device]
        )

    def _save(self, name: str, compiled: jax.stages.Compiled) -> None:
        if self._folder is None:
            return
        payload, _, _ = serialize_executable.serialize(compiled)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(payload).digest() + payload)
            os.replace(temporary, self._folder / name)  # a reader sees the whole file or none
        except OSError as error:
            log.warning("executable %s could not be kept: %s", name, error)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _source_digest() -> str:
    """Digest of the source that programs are traced from: an edit invalidates every executable."""
    digest = hashlib.sha256()
    for name in ("models", "runtime", "layers", "pallas_kernels", "sharding"):
        package = importlib.import_module(f"jengine.{name}")
        for folder in package.__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()
