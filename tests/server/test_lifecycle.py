"""Loading, draining, dying: what probes see, what clients get, how the process would exit."""

import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

from jengine.client import Client, RpcFailedError
from jengine.errors import EngineDeadError, EngineDrainingError
from tests.server.harness import RunningServer, echo_server, events, get, post, wait_for

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health_of(server: RunningServer, name: str = "") -> int:
    with grpc.insecure_channel(server.grpc) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status


def test_not_serving_until_a_token_was_made(echo_model: Path) -> None:
    # The warm-up request's one step takes a second: all that time the engine is there, but not
    # serving.
    with echo_server(echo_model, behaviour={"step_seconds": 1.0}, wait_ready=False) as server:
        assert health_of(server) == NOT_SERVING
        for path, expected in {"/health": 503, "/ready": 503, "/readyz": 503, "/live": 200}.items():
            assert get(server.http + path)[0] == expected
        status, answer, headers = post(server.http + "/v1/completions", {"prompt": "a"})
        assert (status, answer["error"]["message"]) == (503, "the model is still loading")
        assert headers["retry-after"] == "1"
        with Client(server.grpc) as client, pytest.raises(RpcFailedError, match="UNAVAILABLE"):
            client.server_info()
        assert get(server.http + "/version")[0] == 200
        wait_for(lambda: health_of(server) == SERVING, 10.0)
        wait_for(lambda: get(server.http + "/health")[0] == 200, 1.0)


def test_a_model_that_does_not_load(echo_model: Path) -> None:
    broken = {"fail_to_load": "no such tensor"}
    with echo_server(echo_model, behaviour=broken, wait_ready=False) as server:
        assert server.ended.wait(10.0)
    assert server.exit_code == 1


def test_drain_finishes_what_runs_and_refuses_the_rest(echo_model: Path) -> None:
    with echo_server(echo_model, behaviour={"step_seconds": 0.01}) as server:
        texts: list[str] = []
        body = {"prompt": "ab", "max_tokens": 100, "stream": True}

        def over_http() -> None:
            chunks = events(server.http + "/v1/completions", body)
            texts.append("".join(chunk["choices"][0]["text"] for chunk in chunks))

        def over_grpc() -> None:
            with Client(server.grpc) as client:
                deltas = client.generate("ab", max_tokens=100, temperature=0)
                texts.append("".join(delta.text for delta in deltas))

        threads = [threading.Thread(target=f) for f in (over_http, over_grpc) * 4]
        late = Client(server.grpc)
        late.server_info()
        for thread in threads:
            thread.start()
        wait_for(lambda: len(server.utility("running")) == 8, 5.0)
        server.stop()
        wait_for(lambda: get(server.http + "/health")[0] == 503, 1.0)
        assert health_of(server) == NOT_SERVING
        assert health_of(server, "vllm.grpc.engine.VllmEngine") == NOT_SERVING
        assert post(server.http + "/v1/completions", {"prompt": "a"})[0] == 503
        with pytest.raises(EngineDrainingError):
            list(late.generate("a"))
        late.close()
        for thread in threads:
            thread.join()
        assert server.ended.wait(10.0)
    assert texts == ["ab" * 50] * 8
    assert server.exit_code == 0


def test_what_is_too_slow_to_drain_is_aborted(echo_model: Path) -> None:
    slow = {"step_seconds": 0.02}
    with (
        echo_server(echo_model, behaviour=slow, shutdown_timeout=0.3) as server,
        Client(server.grpc) as client,
    ):
        stream = client.generate("ab", max_tokens=250, temperature=0)
        next(stream)
        server.stop()
        *_, last = list(stream)
        assert last.finish is not None
        assert last.finish.reason == "abort"
        assert server.ended.wait(5.0)
    assert server.exit_code == 0


def test_asked_twice_it_stops_at_once(echo_model: Path) -> None:
    slow = {"step_seconds": 0.02}
    with (
        echo_server(echo_model, behaviour=slow, shutdown_timeout=60.0) as server,
        Client(server.grpc) as client,
    ):
        stream = client.generate("ab", max_tokens=250, temperature=0)
        next(stream)
        server.stop()
        started = time.monotonic()
        server.stop()
        *_, last = list(stream)
        assert last.finish is not None
        assert last.finish.reason == "abort"
        assert server.ended.wait(5.0)
        assert time.monotonic() - started < 4.0
    assert server.exit_code == 0


@pytest.mark.parametrize("how", ["die_at_step", "exit_at_step"])
def test_a_dead_core_shows_within_a_second(echo_model: Path, how: str) -> None:
    """With a message, and without one (its process is gone)."""
    # Step 1 is the warm-up; the request's steps follow.
    behaviour = {how: 20, "step_seconds": 0.01}
    in_process = how == "die_at_step"
    with echo_server(echo_model, behaviour=behaviour, in_process=in_process) as server:
        with Client(server.grpc) as client, pytest.raises(EngineDeadError):
            list(client.generate("ab", max_tokens=200, temperature=0))
        died = time.monotonic()
        wait_for(lambda: health_of(server) == NOT_SERVING, 1.0)
        assert get(server.http + "/health")[0] == 503
        assert get(server.http + "/live")[0] == 503
        assert time.monotonic() - died < 1.0
        status, answer, _ = post(server.http + "/v1/completions", {"prompt": "a"})
        assert (status, answer["error"]["type"]) == (503, "ServiceUnavailableError")
        with grpc.insecure_channel(server.grpc) as channel:
            stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            assert not stub.HealthCheck(pb.HealthCheckRequest()).healthy
        assert server.ended.wait(10.0), "the process must end, for its supervisor to restart it"
    assert server.exit_code == 1


def test_a_stream_cut_by_death_ends_with_an_error_event(echo_model: Path) -> None:
    behaviour = {"die_at_step": 20, "step_seconds": 0.01}
    with echo_server(echo_model, behaviour=behaviour) as server:
        body = {"prompt": "ab", "max_tokens": 200, "stream": True}
        *chunks, last = events(server.http + "/v1/completions", body)
        assert chunks
        assert last["error"]["code"] == 503


def test_one_protocol_alone(echo_model: Path) -> None:
    with echo_server(echo_model, grpc_port=None) as server:
        assert server.app.grpc_port is None
        assert get(server.http + "/health")[0] == 200
    with echo_server(echo_model, port=None, wait_ready=False) as server:
        wait_for(lambda: health_of(server) == SERVING, 10.0)
        assert server.app.http_port is None
