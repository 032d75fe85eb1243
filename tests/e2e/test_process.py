"""Signals and deaths of real processes."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jengine.client import Client, collect
from tests.e2e.live import LiveServer, exit_code, live_server
from tests.server.harness import events, get, wait_for


def grpc_health(live: LiveServer) -> int:
    with grpc.insecure_channel(live.grpc) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status


def test_sigterm_drains_and_exits_with_zero(smollm2_gguf: Path, tmp_path: Path) -> None:
    with live_server(tmp_path / "server.log") as server:
        assert grpc_health(server) == health_pb2.HealthCheckResponse.SERVING
        tokens: list[int] = []

        def over_grpc() -> None:
            with Client(server.grpc) as client:
                (whole,) = collect(
                    client.generate("One, two,", max_tokens=60, temperature=0, ignore_eos=True)
                )
                tokens.append(len(whole.token_ids))

        def over_http() -> None:
            body = {"prompt": "One, two,", "max_tokens": 60, "ignore_eos": True, "stream": True}
            body["stream_options"] = {"include_usage": True}
            chunks = events(server.http + "/v1/completions", body)
            tokens.append(chunks[-1]["usage"]["completion_tokens"])

        threads = [threading.Thread(target=f) for f in (over_grpc, over_http)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.load()["num_running"] == 2, 20.0)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: get(server.http + "/health")[0] == 503, 1.0)
        assert grpc_health(server) == health_pb2.HealthCheckResponse.NOT_SERVING
        for thread in threads:
            thread.join()
        assert tokens == [60, 60]
        assert exit_code(server) == 0


def test_a_killed_core_shows_within_a_second(smollm2_gguf: Path, tmp_path: Path) -> None:
    with live_server(tmp_path / "server.log") as server:
        os.kill(server.core_pid(), signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: get(server.http + "/health")[0] == 503, 1.0)
        wait_for(lambda: grpc_health(server) == health_pb2.HealthCheckResponse.NOT_SERVING, 1.0)
        assert time.monotonic() - killed < 1.0
        assert exit_code(server) == 1
