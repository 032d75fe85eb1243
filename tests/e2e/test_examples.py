"""What README and examples show runs as shown, on the real model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

REPO = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("smollm2_gguf")


def test_readme_example() -> None:
    code = re.search(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    assert code is not None
    printed = _run("-c", code[1])
    assert "The capital of France is ->  Paris" in printed
    assert "(49152, 576)" in printed
    assert "KV cache" in printed


def test_offline_inference() -> None:
    printed = _run("examples/offline_inference.py")
    assert printed.count("Generated text: ") == 4
    assert "Chat: 'The sea" in printed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook libraries
def test_notebook_tour() -> None:
    """In a real kernel, whose event loop is running; its asserts are the test."""
    notebook = nbformat.read(REPO / "examples" / "notebook_tour.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(REPO)}}
    )
    client.execute()
    assert any("Paris" in str(cell.get("outputs")) for cell in notebook.cells)


def _run(*arguments: str) -> str:
    """A process of its own, without the strict settings of this one, as a reader would run it."""
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},  # jengine may not be installed here
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
