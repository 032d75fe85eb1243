"""However a client leaves, its request ends at once."""

import http.client
import json
import random
import threading
import time
from typing import Any

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

from jengine.client import CallOptions, Client
from tests.server.harness import RunningServer, wait_for

LONG = {"max_tokens": 200, "temperature": 0.0}  # a second on the slow server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("read_first", [False, True])
def test_http_disconnect(
    slow_server: RunningServer, path: str, stream: bool, read_first: bool
) -> None:
    body: dict[str, Any] = {**LONG, "stream": stream}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "a"}]
    else:
        body["prompt"] = ["a", "b"]
    connection = http.client.HTTPConnection("127.0.0.1", slow_server.app.http_port or 0)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    wait_for(lambda: bool(slow_server.utility("running")), 5.0)
    if stream and read_first:
        connection.getresponse().read(100)
    before = time.monotonic()
    connection.close()
    slow_server.wait_idle()
    assert time.monotonic() - before < 0.5


def test_grpc_cancel_and_deadline(slow_server: RunningServer) -> None:
    with Client(slow_server.grpc) as client:
        for options in (CallOptions(), CallOptions(final_only=True, timeout=0.2)):
            stream = client.generate("a", options, **LONG)
            if not options.final_only:
                next(stream)
                stream.close()  # type: ignore[attr-defined]
            else:
                with pytest.raises(TimeoutError):
                    next(stream)
            before = time.monotonic()
            slow_server.wait_idle()
            assert time.monotonic() - before < 0.5


def test_abort_rpc_ends_the_other_stream(slow_server: RunningServer) -> None:
    with grpc.insecure_channel(slow_server.grpc) as channel:
        stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        params = pb.SamplingParams(max_tokens=200, temperature=0.0)
        for stream in (True, False):
            call = stub.Generate(
                pb.GenerateRequest(request_id="x", text="ab", sampling_params=params, stream=stream)
            )
            wait_for(lambda: bool(slow_server.utility("running")), 5.0)
            time.sleep(0.05)
            stub.Abort(pb.AbortRequest(request_ids=["x", "unknown"]))
            *_, last = list(call)  # ends, and with OK
            assert last.complete.finish_reason == "abort"
            assert 0 < last.complete.completion_tokens < 200
            slow_server.wait_idle()
            stub.Abort(pb.AbortRequest(request_ids=["x"]))  # idempotent


def test_abort_reaches_the_other_services(slow_server: RunningServer) -> None:
    with grpc.insecure_channel(slow_server.grpc) as channel, Client(slow_server.grpc) as client:
        stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        stream = client.generate("ab", CallOptions(request_id="y"), **LONG)
        next(stream)
        stub.Abort(pb.AbortRequest(request_ids=["y"]))
        *_, last = list(stream)
        assert last.finish is not None
        assert last.finish.reason == "abort"


def test_many_streams_with_random_cancels(slow_server: RunningServer) -> None:
    """200 at once, half leave early; then nothing is left and the server answers quickly."""
    rng = random.Random(0)
    leave_after = [rng.randrange(10) if rng.random() < 0.5 else None for _ in range(200)]
    finished: list[int] = []

    def use(client: Client, limit: int | None) -> None:
        stream = client.generate("ab", max_tokens=20, temperature=0.0)
        for count, delta in enumerate(stream):
            if limit is not None and count >= limit:
                break
            if delta.finish is not None:
                finished.append(delta.finish.completion_tokens)
        stream.close()  # type: ignore[attr-defined]

    with Client(slow_server.grpc) as client:
        threads = [threading.Thread(target=use, args=(client, limit)) for limit in leave_after]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        slow_server.wait_idle()
        assert finished == [20] * len(finished)
        assert len(finished) >= leave_after.count(None)
        started = time.monotonic()
        list(client.generate("ab", max_tokens=1))
        assert time.monotonic() - started < 1.0
