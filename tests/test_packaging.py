"""The installed names are jengine.*, and nothing generic leaks to the top level."""

import fnmatch
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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


def test_every_data_file_is_shipped() -> None:
    """A wheel holds only what package-data names; a file it misses works in a clone alone."""
    patterns = _declared()["package-data"]["*"]
    missing = [
        str(path.relative_to(REPO))
        for root in ("jengine", *SIBLINGS)
        for path in (REPO / root).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.suffix not in (".py", ".so")
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
    ]
    assert not missing


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
