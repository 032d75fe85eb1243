"""A server process as users start it, on the demo model."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jengine.client import Client
from tests.server.harness import free_port, get, wait_for

MODEL = "smollm2-135m"
REPO = Path(__file__).resolve().parents[2]
START_SECONDS = 240.0  # the first run on a machine compiles
STOP_SECONDS = 30.0
# Few buckets; the same in every test, so that only the first server of all compiles.
FLAGS = ["--max-num-seqs", "16", "--max-num-batched-tokens", "128", "--max-model-len", "512"]
FLAGS += ["--kv-cache-memory-bytes", str(64 * 1024 * 1024), "--log-format", "json"]


@dataclass
class LiveServer:
    process: subprocess.Popen[bytes]
    http_port: int
    grpc_port: int
    log: Path

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def is_healthy(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return get(self.http + "/health")[0] == 200
        except OSError:
            return False

    def load(self) -> dict[str, int]:
        with Client(self.grpc) as client:
            return client.server_info().load

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Until no request runs and no page is used."""
        wait_for(lambda: not any(self.load().values()), seconds)

    def core_pid(self) -> int:
        """The engine core: the child whose command line speaks of it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for pid in map(int, children.split()):
            if b"core_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError(f"no engine core among the children {children!r}")

    def metric(self, name: str) -> float:
        lines = get(self.http + "/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))

    def resident_bytes(self) -> int:
        """Memory of the server's process and its engine core's."""
        pages = sum(
            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            for pid in (self.process.pid, self.core_pid())
        )
        return pages * os.sysconf("SC_PAGE_SIZE")

    def log_records(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


@contextmanager
def live_server(log: Path, *flags: str, model: str = MODEL) -> Iterator[LiveServer]:
    """`flags` come after `FLAGS`, and win."""
    http_port, grpc_port = free_port(), free_port()
    command = [sys.executable, "-m", "jengine.server", "serve", model, *FLAGS, *flags]
    command += ["--port", str(http_port), "--grpc-port", str(grpc_port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=REPO, stdout=out, stderr=out, start_new_session=True
        )
    server = LiveServer(process, http_port, grpc_port, log)
    try:
        wait_for(server.is_healthy, START_SECONDS)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def exit_code(server: LiveServer, seconds: float = STOP_SECONDS) -> int:
    started = time.monotonic()
    wait_for(lambda: server.process.poll() is not None, seconds)
    assert time.monotonic() - started < seconds
    return server.process.returncode
