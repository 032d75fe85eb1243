"""The installed names are jengine.*, and nothing generic leaks to the top level."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parents[1]
SIBLINGS = ("layers", "pallas_kernels", "sharding", "server")


def _declared() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]


def _packages_on_disk() -> set[str]:
    """Every directory with an __init__.py, under the name it is imported by."""
    roots = {"jengine": REPO / "jengine"} | {f"jengine.{d}": REPO / d for d in SIBLINGS}
    found = set()
    for name, root in roots.items():
        for init in root.rglob("__init__.py"):
            inside = init.parent.relative_to(root).parts
            if name == "jengine" and inside and inside[0] in SIBLINGS:
                continue  # reached through a symlink; counted under its own root
            found.add(".".join((name, *inside)))
    return found


def test_every_package_is_declared() -> None:
    assert set(_declared()["packages"]) == _packages_on_disk()


def test_wheel_holds_every_file(tmp_path: Path) -> None:
    """A file that package-data misses works in a clone and nowhere else."""
    # Not by importing it: that fails in a process whose tests imported the standard distutils.
    assert int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("jengine", *SIBLINGS):
        shutil.copytree(REPO / name, source / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    on_disk = {
        str(Path(prefix, path.relative_to(source / top)))
        for top, prefix in {"jengine": "jengine", **{d: f"jengine/{d}" for d in SIBLINGS}}.items()
        for path in (source / top).rglob("*")
        if path.is_file()
    }
    assert shipped == on_disk


@pytest.mark.parametrize("name", SIBLINGS)
def test_mapping_and_symlink_agree(name: str) -> None:
    assert _declared()["package-dir"][f"jengine.{name}"] == name
    link = REPO / "jengine" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


def test_users_own_modules_do_not_shadow_ours(tmp_path: Path) -> None:
    """A notebook folder holding server.py, layers.py, ... must not break the engine."""
    for name in SIBLINGS:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    probe = (
        f"import sys; sys.path.append({str(REPO)!r})\n"  # last, as an install would be
        "import jengine.layers, jengine.pallas_kernels, jengine.sharding, jengine.server\n"
        f"print(sorted(set(sys.modules) & {set(SIBLINGS)!r}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


def test_every_imported_package_is_a_dependency() -> None:
    """What we import comes from a declared requirement, not from a requirement of one. What only
    programs for GPUs import may come from their extra, and be absent here."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["cuda13"]
    declared = {_normal(Requirement(text).name) for text in requirements}
    owners = importlib.metadata.packages_distributions()
    roots = [REPO / name for name in ("jengine", *SIBLINGS)]
    imported = {
        name for root in roots for path in root.rglob("*.py") for name in _top_level_imports(path)
    }
    third_party = imported - set(sys.stdlib_module_names) - {"jengine"}
    undeclared = {
        name: owners.get(name)
        for name in sorted(third_party)
        if not declared & {_normal(owner) for owner in owners.get(name, (name,))}
    }
    assert not undeclared


def _top_level_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
