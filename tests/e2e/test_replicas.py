"""Two replicas of a real model under our supervisor, a public gateway in front: one is killed while
clients ask, and no request fails."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.gateway import smg_gateway
from tests.e2e.live import FLAGS, MODEL, REPO, START_SECONDS, STOP_SECONDS
from tests.server.harness import free_port, get, post, wait_for

pytestmark = pytest.mark.slow
NUM_REQUESTS = 200
NUM_CLIENTS = 8
KILL_AFTER = 60
PROMPTS = ["The capital of France is", "One, two, three,", "Water boils at", "Once upon a time"]


@dataclass
class Replicas:
    process: subprocess.Popen[bytes]
    port: int  # of the supervisor
    http: list[str]
    grpc: list[str]

    def report(self) -> list[dict[str, Any]]:
        assert self.process.poll() is None
        try:
            return json.loads(get(f"http://127.0.0.1:{self.port}/ready")[1])["replicas"]
        except OSError:
            return []

    def are_serving(self) -> bool:
        return [replica["status"] for replica in self.report()] == ["serving"] * 2


@pytest.fixture
def replicas(smollm2_gguf: Path, tmp_path: Path) -> Iterator[Replicas]:
    first, grpc_first, port = _free_pair(), _free_pair(), free_port()
    command = [sys.executable, "-m", "jengine.server", "serve", MODEL, *FLAGS]
    command += ["--port", str(first), "--grpc-port", str(grpc_first), "--data-parallel-size", "2"]
    command += ["--data-parallel-multi-port-external-lb", "--data-parallel-on-failure", "restart"]
    command += ["--data-parallel-supervisor-port", str(port)]
    command += ["--dp-supervisor-probe-interval-s", "1"]
    with (tmp_path / "supervisor.log").open("wb") as out:
        process = subprocess.Popen(
            command, cwd=REPO, stdout=out, stderr=out, start_new_session=True
        )
    urls = [f"127.0.0.1:{p + i}" for p in (first, grpc_first) for i in range(2)]
    running = Replicas(process, port, [f"http://{url}" for url in urls[:2]], urls[2:])
    try:
        wait_for(running.are_serving, START_SECONDS)
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
        process.wait()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_no_request_fails_when_a_replica_is_killed(
    replicas: Replicas, tmp_path: Path, protocol: str
) -> None:
    def body(i: int) -> dict[str, Any]:
        return {"model": MODEL, "prompt": PROMPTS[i % 4], "max_tokens": 16, "temperature": 0}

    expected = [
        post(replicas.http[0] + "/v1/completions", body(i))[1]["choices"][0]["text"]
        for i in range(len(PROMPTS))
    ]
    workers = replicas.http if protocol == "http" else [f"grpc://{u}" for u in replicas.grpc]
    flags = ["--policy", "round_robin", "--health-check-interval-secs", "2"]
    flags += [] if protocol == "http" else ["--backend", "vllm"]
    answers: list[tuple[int, Any]] = []
    indices = iter(range(NUM_REQUESTS))
    lock = threading.Lock()

    def ask(url: str) -> None:
        while True:
            with lock:
                i = next(indices, None)
            if i is None:
                return
            status, answer, _ = post(url + "/v1/completions", body(i))
            text = answer["choices"][0]["text"] if status == 200 else answer
            with lock:
                answers.append((status, text == expected[i % 4] if status == 200 else text))

    with smg_gateway(workers, tmp_path / "smg.log", *flags) as url:
        # The gateway fetches the tokenizer from a worker once it knows it.
        wait_for(lambda: post(url + "/v1/completions", body(0))[0] == 200, 60.0)
        clients = [threading.Thread(target=ask, args=(url,)) for _ in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        wait_for(lambda: len(answers) >= KILL_AFTER, 120.0)
        victim = replicas.report()[1]
        os.kill(victim["pid"], signal.SIGKILL)
        killed_at = time.monotonic()
        num_before = len(answers)
        for client in clients:
            client.join()
        assert num_before < NUM_REQUESTS  # it happened in the middle
        assert answers == [(200, True)] * NUM_REQUESTS
        wait_for(replicas.are_serving, START_SECONDS)
        back = replicas.report()[1]
        assert (back["num_starts"], back["pid"] != victim["pid"]) == (2, True)
        seconds = time.monotonic() - killed_at
        print(f"{protocol}: killed after {num_before} requests, back in {seconds:.1f} s")
    replicas.process.send_signal(signal.SIGTERM)
    assert replicas.process.wait(STOP_SECONDS) == 0


def _free_pair() -> int:
    """The first of two consecutive ports that nobody has."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), _bound(port + 1):
            return port


@contextlib.contextmanager
def _bound(port: int) -> Iterator[None]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", port))
        yield
