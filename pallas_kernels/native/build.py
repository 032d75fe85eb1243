"""Builds the C++ library of CPU kernels from the sources beside this file, once per machine and
toolchain.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax.ffi
import jaxlib.version

from jengine.config import cache_root

SOURCES = Path(__file__).parent / "src"
LIBRARY_NAME = "libjengine_cpu.so"
# fp-contract: the portable path relies on a*b+c becoming one fused multiply-add everywhere, for
# equal bits.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-pthread", "-w")
NATIVE = "-march=native"
COMPILE_TIMEOUT_S = 300


class NativeBuildError(RuntimeError):
    """The library could not be built; the message says why, with the compiler's words."""


def find_compiler() -> str | None:
    """The C++ compiler on PATH, or None."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def library_path(compiler: str) -> Path:
    """Where the library for this compiler, CPU, jaxlib and these sources lies, built or not."""
    digest = hashlib.sha256()
    for part in (
        _run([compiler, "--version"]),
        jaxlib.version.__version__,
        _cpu_description(),
        " ".join((*FLAGS, NATIVE)),
    ):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return cache_root() / "native" / digest.hexdigest()[:16] / LIBRARY_NAME


def build_library() -> Path:
    """Return the path of the library, building it if needed. One process builds; others wait for
    it.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NativeBuildError("no C++ compiler (c++, g++ or clang++) on PATH")
    target = library_path(compiler)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / "lock"):
            if not target.exists():
                compile_library(compiler, target, NATIVE)
    except OSError as error:
        raise NativeBuildError(f"cannot write {target.parent}: {error}") from error
    return target


def compile_library(compiler: str, target: Path, machine: str) -> None:
    """Compile for the machine that the compiler flag `machine` names, into `target`."""
    sources = sorted(SOURCES.glob("*.cc"))
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        include = f"-I{jax.ffi.include_dir()}"
        commands = [
            [compiler, *FLAGS, machine, include, "-c", str(source), "-o", str(out)]
            for source, out in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        library = Path(folder) / LIBRARY_NAME
        _run([compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)])
        library.replace(target)  # atomic: a reader sees no library or a whole one


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise NativeBuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _cpu_description() -> str:
    """What -march=native depends on: the architecture and the CPU's feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(
        [platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})]
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the system if this process dies
        yield
