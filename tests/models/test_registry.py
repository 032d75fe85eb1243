"""The table of architectures: its own entries, those of other packages, and what is unknown."""

import importlib
import sys
from pathlib import Path

import pytest

from jengine.errors import LoadError
from jengine.models.registry import ARCHITECTURES, resolve_architecture
from jengine.runtime.aot import family_digest

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "models.md"
METADATA = "Metadata-Version: 2.1\nName: otherpackage\nVersion: 1.0\n"


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution, as pip leaves it: a module, and metadata with entry points."""
    (tmp_path / "otherpackage.py").write_text(
        "from jengine.models.llama import LlamaForCausalLM\n"
        "class OtherForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    info = tmp_path / "otherpackage-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(
        "[jengine.models]\n"
        "OtherForCausalLM = otherpackage:OtherForCausalLM\n"
        "GoneForCausalLM = otherpackage:GoneForCausalLM\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "otherpackage", raising=False)
    return tmp_path


def test_another_package_adds_a_family(other_package: Path) -> None:
    name, model_class = resolve_architecture({"architectures": ["OtherForCausalLM"]})
    assert (name, model_class.__module__) == ("OtherForCausalLM", "otherpackage")
    with pytest.raises(LoadError, match="nearest known: OtherForCausalLM"):
        resolve_architecture({"architectures": ["OthersForCausalLM"]})
    with pytest.raises(LoadError, match=r"'otherpackage:GoneForCausalLM' cannot be loaded"):
        resolve_architecture({"architectures": ["GoneForCausalLM"]})


def test_an_edit_of_the_package_invalidates_its_executables(other_package: Path) -> None:
    resolve_architecture({"architectures": ["OtherForCausalLM"]})
    before = family_digest.__wrapped__("otherpackage")
    assert before is not None
    with (other_package / "otherpackage.py").open("a") as file:
        file.write("# edited\n")
    assert family_digest.__wrapped__("otherpackage") != before
    assert family_digest.__wrapped__("jengine.models.llama") is None  # `source_digest` has ours


def test_without_the_package_it_is_unknown() -> None:
    with pytest.raises(LoadError, match="'OtherForCausalLM' is not supported"):
        resolve_architecture({"architectures": ["OtherForCausalLM"]})


@pytest.mark.parametrize(
    ("architectures", "near"),
    [
        (["Gemma4ForCausalLM"], "Gemma3ForCausalLM"),
        (["Qwen2ForCausalML"], "Qwen2ForCausalLM"),
        ([], ""),
    ],
)
def test_an_unknown_architecture_names_the_nearest(architectures: list[str], near: str) -> None:
    with pytest.raises(LoadError, match=f"nearest known: .*{near}"):
        resolve_architecture({"architectures": architectures})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_entry_loads_and_is_documented(architecture: str) -> None:
    _, model_class = resolve_architecture({"architectures": [architecture]})
    module, _, attribute = ARCHITECTURES[architecture].partition(":")
    assert model_class is getattr(importlib.import_module(module), attribute)
    assert f"`{architecture}`" in DOCUMENTATION.read_text("utf-8")
