"""What README and examples show runs as shown, on the real model."""

import os
import re
import subprocess
import sys

import nbclient
import nbformat
import pytest

from tests.e2e.live import REPO, LiveServer

# Processes of their own, without this one's strict settings, as a reader runs them. jengine may
# not be installed here.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}

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


def test_demo() -> None:
    printed = _run("examples/demo.py")
    assert "Paris" in printed
    assert "tokens/s" in printed
    assert "Memory plan" in printed


def test_grpc_client(live: LiveServer) -> None:
    printed = _run("examples/grpc_client.py", live.grpc)
    assert "smollm2-135m: LlamaForCausalLM, " in printed
    assert re.search(r"\d+ tokens, the first after \d\.\d+ s", printed)


def test_openai_client(live: LiveServer) -> None:
    printed = _run("examples/openai_client.py", live.http + "/v1")
    assert "sky" in printed
    assert re.search(r"\d+ tokens in, \d+ out", printed)


def _run(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
