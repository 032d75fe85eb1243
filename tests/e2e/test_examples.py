"""What README and examples show runs as shown, on the real model."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbclient
import nbformat
import pytest

REPO = Path(__file__).resolve().parents[2]
# Processes of their own, without this one's strict settings, as a reader runs them. jengine may
# not be installed here.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}
# As in examples/demo.py, so that all servers here share their executables.
SERVER_FLAGS = ("--max-num-seqs=8", "--max-num-batched-tokens=256", "--max-model-len=2048")
START_SECONDS = 240.0

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


@dataclass(frozen=True)
class Address:
    http: str
    grpc: str


@pytest.fixture(scope="module")
def served(smollm2_gguf: Path) -> Iterator[Address]:
    """`jengine serve` with the demo model."""
    http_port, grpc_port = _free_ports()
    command = [sys.executable, "-m", "jengine.server", "serve", "smollm2-135m", *SERVER_FLAGS]
    command += [f"--port={http_port}", f"--grpc-port={grpc_port}"]
    process = subprocess.Popen(command, cwd=REPO, env=ENVIRONMENT)
    try:
        _wait_until_healthy(process, f"http://127.0.0.1:{http_port}/health")
        yield Address(f"http://127.0.0.1:{http_port}/v1", f"127.0.0.1:{grpc_port}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


def test_grpc_client(served: Address) -> None:
    printed = _run("examples/grpc_client.py", served.grpc)
    assert "smollm2-135m: LlamaForCausalLM, 2048 tokens" in printed
    assert re.search(r"\d+ tokens, the first after \d\.\d+ s", printed)


def test_openai_client(served: Address) -> None:
    printed = _run("examples/openai_client.py", served.http)
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


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"the server did not become healthy (exit code {process.poll()})")
