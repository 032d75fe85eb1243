"""Real servers as children of a real supervisor: killed, stopped, hung, drained."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jengine.server import replica_process, supervisor
from jengine.server.replica_process import ReplicaProcess
from jengine.server.replicas import Replica, SupervisorSettings
from jengine.server.settings import ServerSettings
from jengine.server.supervisor import MakeCommand, Supervisor
from tests.server.harness import events, free_port, get, wait_for

REPO = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0
STREAM = {"prompt": "ab", "max_tokens": 100, "stream": True}


class Running:
    """A supervisor on a loop in a thread; its children are processes."""

    def __init__(self, supervisor: Supervisor, ports: list[int], port: int) -> None:
        self.supervisor = supervisor
        self.urls = [f"http://127.0.0.1:{p}" for p in ports]
        self.url = f"http://127.0.0.1:{port}"
        self.exit_code: int | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        async def main() -> int:
            self.loop = asyncio.get_running_loop()
            return await self.supervisor.run()

        self.exit_code = asyncio.run(main())

    def stop(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.supervisor.request_stop)

    def status(self, path: str = "/ready") -> int:
        try:
            return get(self.url + path)[0]
        except OSError:
            return 0

    def replicas(self) -> list[dict[str, Any]]:
        return json.loads(get(self.url + "/ready")[1])["replicas"]

    def join(self, seconds: float = 20.0) -> int | None:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the supervisor did not end"
        return self.exit_code


@contextmanager
def supervised(
    make: MakeCommand | None, folder: Path, on_failure: Any = "stop"
) -> Iterator[Running]:
    def make_echo(replica: Replica) -> list[str]:
        words = [sys.executable, "-m", "tests.oracles.echo_server", str(replica.port)]
        return [*words, str(folder), "--follow-stdin"]

    ports, port = [free_port(), free_port()], free_port()
    replicas = [Replica(rank, p, None, ()) for rank, p in enumerate(ports)]
    settings = SupervisorSettings(port, 0.2, 1.0, 2, on_failure)
    server = ServerSettings(grpc_port=None, shutdown_timeout=5.0)
    running = Running(Supervisor(replicas, make or make_echo, server, settings), ports, port)
    running.thread.start()
    try:
        yield running
    finally:
        if running.thread.is_alive():
            running.stop()
        running.join()


@pytest.fixture
def in_repo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)  # children import the tests' oracles


def test_one_death_ends_all_and_the_others_drain(echo_model: Path, in_repo: None) -> None:
    with supervised(None, echo_model) as running:
        wait_for(lambda: running.status() > 0, START_SECONDS)
        assert (running.status("/health"), running.status("/readyz")) == (503, 503)
        wait_for(lambda: running.status() == 200, START_SECONDS)
        assert running.status("/health") == 200
        text: list[str] = []

        def read() -> None:
            chunks = events(running.urls[1] + "/v1/completions", STREAM)
            text.append("".join(chunk["choices"][0]["text"] for chunk in chunks))

        reader = threading.Thread(target=read)
        reader.start()
        wait_for(lambda: json.loads(get(running.urls[1] + "/load")[1])["server_load"] == 1, 5.0)
        victim, survivor = running.replicas()
        os.kill(victim["pid"], signal.SIGKILL)
        assert running.join() == 75
        reader.join()
        assert text == ["ab" * 50]  # it was let finish
        assert not Path(f"/proc/{survivor['pid']}").exists()


@pytest.mark.slow
def test_a_replica_is_replaced_while_the_other_serves(
    echo_model: Path, in_repo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_process, "EXIT_GRACE_SECONDS", 1.0)
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_SECONDS", 0.2)
    with supervised(None, echo_model, "restart") as running:
        both = ["serving", "serving"]
        wait_for(lambda: running.status() == 200, START_SECONDS)
        wait_for(lambda: [r["status"] for r in running.replicas()] == both, START_SECONDS)
        dead, hung = (replica["pid"] for replica in running.replicas())
        os.kill(dead, signal.SIGKILL)
        wait_for(lambda: running.replicas()[0]["status"] != "serving", 5.0)
        while [r["status"] for r in running.replicas()] != both:
            assert (running.status(), running.status("/health")) == (200, 200)
            assert get(running.urls[1] + "/health")[0] == 200
        assert running.replicas()[0]["pid"] != dead
        # One that hangs answers no probe; SIGTERM does not reach it, SIGKILL does.
        os.kill(hung, signal.SIGSTOP)
        wait_for(lambda: running.replicas()[1]["status"] == "failed", 10.0)
        assert running.status() == 200
        wait_for(lambda: [r["status"] for r in running.replicas()] == both, START_SECONDS)
        assert [r["num_starts"] for r in running.replicas()] == [2, 2]
        running.stop()
        assert running.join() == 0


@pytest.mark.slow
def test_asked_twice_it_ends_at_once(echo_model: Path, in_repo: None) -> None:
    with supervised(None, echo_model) as running:
        wait_for(lambda: running.status() == 200, START_SECONDS)
        body = {"prompt": "ab", "max_tokens": 1000, "stream": True}  # ten seconds
        url = running.urls[1] + "/v1/completions"
        reader = threading.Thread(target=lambda: events(url, body))
        reader.start()
        wait_for(lambda: json.loads(get(running.urls[1] + "/load")[1])["server_load"] == 1, 5.0)
        running.stop()
        wait_for(lambda: get(running.urls[1] + "/health")[0] == 503, 2.0)
        assert running.status() == 503
        running.stop()
        assert running.join(4.0) == 0  # a drain would have taken its five seconds
        reader.join()


@pytest.mark.parametrize(
    ("on_failure", "code", "expected"), [("stop", 78, 78), ("restart", 2, 78), ("stop", 1, 75)]
)
def test_a_replica_that_cannot_start(
    tmp_path: Path, on_failure: str, code: int, expected: int
) -> None:
    def make(replica: Replica) -> list[str]:
        what = f"raise SystemExit({code})" if replica.rank else "import time; time.sleep(60)"
        return [sys.executable, "-c", what]

    with supervised(make, tmp_path, on_failure) as running:
        assert running.join() == expected


async def test_a_replica_sees_its_own_gpus_alone(tmp_path: Path) -> None:
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    command = [sys.executable, "-c", code, str(tmp_path / "seen")]
    replica = Replica(1, free_port(), None, ("2", "GPU-b"))
    child = ReplicaProcess(replica, command, ServerSettings(), SupervisorSettings())
    await child.start()
    assert await child.watch() == "rank 1 has ended with exit code 0"
    assert (tmp_path / "seen").read_text() == "2,GPU-b"


def test_a_server_drains_when_its_supervisor_is_gone(echo_model: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "tests.oracles.echo_server", str(port), str(echo_model)]
    with subprocess.Popen([*command, "--follow-stdin"], cwd=REPO, stdin=subprocess.PIPE) as child:

        def is_healthy() -> bool:
            try:
                return get(f"http://127.0.0.1:{port}/health")[0] == 200
            except OSError:
                return False

        wait_for(is_healthy, START_SECONDS)
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(20.0) == 0
