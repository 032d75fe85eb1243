"""tools/venv.sh finds the interpreter that `make` uses."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "venv.sh"


class Machine:
    """A PATH and a pyenv folder with interpreters that only answer the script's questions."""

    def __init__(self, root: Path) -> None:
        self.bin = root / "bin"
        self.pyenv = root / "pyenv"
        self.bin.mkdir()

    def add(self, path: Path, version: str, *, ensurepip: bool = True) -> Path:
        """An interpreter that reports `version`, or "" for one that fails whatever it is asked."""
        path.parent.mkdir(parents=True, exist_ok=True)
        reply = f"cat >/dev/null; echo {version}" if version else "exit 127"
        path.write_text(
            f'#!/bin/bash\nif [ "$1" = -c ]; then exit {0 if ensurepip else 1}; fi\n{reply}\n'
        )
        path.chmod(0o755)
        return path

    def call(self, code: str, python: str = "") -> subprocess.CompletedProcess[str]:
        env = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "PYENV_ROOT": str(self.pyenv),
            "PYTHON": python,
        }
        # The machine's own interpreters in /usr/bin must not answer: shadow those not under test.
        for name in ("python3.14", "python3.13", "python3.12", "python3.11", "python3"):
            if not (self.bin / name).exists():
                self.add(self.bin / name, "")
        return subprocess.run(
            ["bash", "-c", f"source {SCRIPT}; {code}"],
            env=env,
            cwd=self.bin,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_newest_wins_wherever_it_lives(machine: Machine) -> None:
    machine.add(machine.bin / "python3.11", "3.11.9")
    machine.add(machine.bin / "python3", "3.12.10")
    newest = machine.add(machine.pyenv / "versions" / "3.13.0" / "bin" / "python", "3.13.0")
    assert machine.call("find_python").stdout.strip() == str(newest)


def test_patch_versions_compare_as_numbers(machine: Machine) -> None:
    machine.add(machine.bin / "python3", "3.12.9")
    newest = machine.add(machine.pyenv / "versions" / "3.12.10" / "bin" / "python", "3.12.10")
    assert machine.call("find_python").stdout.strip() == str(newest)


def test_shim_that_fails_is_passed_over(machine: Machine) -> None:
    machine.add(machine.bin / "python3.13", "")
    machine.add(machine.bin / "python3.11", "3.11.2")
    assert machine.call("find_python").stdout.strip() == "python3.11"


def test_interpreter_without_ensurepip_is_passed_over(machine: Machine) -> None:
    machine.add(machine.bin / "python3.13", "3.13.1", ensurepip=False)
    machine.add(machine.bin / "python3.12", "3.12.1")
    assert machine.call("find_python").stdout.strip() == "python3.12"


def test_only_one_without_ensurepip_says_what_to_install(machine: Machine) -> None:
    machine.add(machine.bin / "python3", "3.11.2", ensurepip=False)
    result = machine.call("find_python")
    assert result.returncode != 0
    assert "python3 (3.11.2) has no ensurepip" in result.stderr
    assert "apt-get install python3-venv" in result.stderr


def test_no_interpreter_at_all(machine: Machine) -> None:
    result = machine.call("find_python")
    assert result.returncode != 0
    assert "No CPython 3.11 to 3.14 found" in result.stderr


def test_named_interpreter_that_does_not_run(machine: Machine) -> None:
    machine.add(machine.bin / "python3", "3.12.1")
    result = machine.call("make_venv", python=str(machine.bin / "python3.13"))
    assert result.returncode != 0
    assert "python3.13 is not a CPython 3.11 to 3.14 that runs" in result.stderr
