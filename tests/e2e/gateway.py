"""The public gateway `smg` (PyPI), unmodified, in front of servers of ours."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.live import MODEL
from tests.server.harness import free_port, get, wait_for


@contextmanager
def smg_gateway(workers: Sequence[str], log: Path, *flags: str) -> Iterator[str]:
    """Its URL, once it knows the model."""
    binary = shutil.which("smg")
    if binary is None:
        pytest.skip("smg is not installed (pip install smg, in an environment of its own)")
    port, metrics_port = free_port(), free_port()
    command = [binary, "launch", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", *workers, *flags]
    command += ["--prometheus-port", str(metrics_port), "--prometheus-host", "127.0.0.1"]
    with log.open("wb") as out:
        # It serves on long after SIGTERM: killed as a group, which needs a session of its own.
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: process.poll() is None and _is_ready(url), 60.0)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return MODEL in get(url + "/v1/models")[1]
    except OSError:
        return False
