"""Loads the C++ library of CPU kernels at first use and registers its handlers with XLA."""

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import jax

from jengine.config import is_native_disabled
from jengine.pallas_kernels.native.build import NativeBuildError, build_library, find_compiler
from jengine.pallas_kernels.platform import platform

logger = logging.getLogger(__name__)

PREFIX = "jengine_"
OPERATIONS = ("linear", "kv_write", "ragged_paged_attention", "argmax_rows", "rms_norm", "silu_mul")


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """Whether the library is in use, where it lies, and if not, why."""

    is_available: bool
    path: Path | None
    reason: str | None


@functools.cache
def status() -> NativeStatus:
    """Build, load and register once per process. Never raises: without the library, plain JAX does
    the work.
    """
    if is_native_disabled():
        return NativeStatus(False, None, "disabled by JENGINE_NATIVE=0")
    try:
        path = build_library()
        register(path, PREFIX)
    except (NativeBuildError, OSError) as error:
        logger.warning(
            "CPU kernels in C++ are not available, plain JAX takes their place (slower): %s", error
        )
        return NativeStatus(False, None, str(error))
    return NativeStatus(True, path, None)


def register(path: Path, prefix: str) -> None:
    """Load a library and register its handlers as `prefix` + operation."""
    library = ctypes.CDLL(str(path))
    for operation in OPERATIONS:
        handler = jax.ffi.pycapsule(getattr(library, PREFIX + operation))
        jax.ffi.register_ffi_target(prefix + operation, handler, platform="cpu")


def is_available() -> bool:
    """Whether operations on CPU go to the C++ library. The first call may build it (about ten
    seconds).
    """
    return status().is_available


def require() -> None:
    """Refuse (see `dispatch.py`) unless this is a CPU with the library."""
    if platform() != "cpu":
        raise NotImplementedError("the C++ kernels run on CPU")
    if not is_available():
        raise NotImplementedError(status().reason)


def fingerprint() -> str:
    """Part of the key of stored executables: they call the library's handlers by name, and must not
    without it.

    Call it before loading such an executable: it registers the handlers.
    """
    path = status().path
    return "plain" if path is None else path.parent.name


def describe() -> dict[str, str]:
    """For `collect-env`."""
    now = status()
    return {
        "native kernels": "in use" if now.is_available else f"not in use: {now.reason}",
        "native library": str(now.path),
        "native fingerprint": fingerprint(),
        "C++ compiler": str(find_compiler()),
    }
