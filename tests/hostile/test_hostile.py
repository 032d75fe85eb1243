"""Nothing kills it: hostile clients beside normal ones."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.e2e.live import LiveServer, live_server
from tests.hostile.grpc_cases import grpc_cases
from tests.hostile.http_cases import hand_made, http_cases
from tests.hostile.runner import Neighbours, departures, every, run_grpc, run_http
from tests.hostile.sockets import GOOD, dawdle, run_broken
from tests.hostile.wire import COMPLETIONS, DONE, Answer, ask_json, request_bytes
from tests.server.harness import get, wait_for

ARRIVAL_SECONDS, UNREAD_SECONDS = 2.0, 3.0
FLAGS = ("--max-model-len", "256", "--arrival-timeout", str(ARRIVAL_SECONDS))
FLAGS += ("--unread-timeout", str(UNREAD_SECONDS), "--max-num-waiting", "1000")
NAN_ID = 511  # no text has it
MAX_GROWTH_BYTES = (
    600 * 2**20
)  # buckets and grammars used for the first time; the soak looks closer
STRIDE = 50  # of the default run


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A tiny Llama of which one token's embedding is not a number."""
    folder = tmp_path_factory.mktemp("hostile")
    model = shutil.copytree(tiny_llama, folder / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][NAN_ID] = np.nan
    save_file(tensors, model / "model.safetensors")
    with live_server(folder / "server.log", *FLAGS, model=str(model)) as server:
        yield server


async def besiege(server: LiveServer, stride: int) -> list[str]:
    """What was wrong with the answers to hostile requests, and to their neighbours'."""
    neighbours = Neighbours(server)
    await neighbours.listen_alone()
    kept = [case for case in hand_made() if stride == 1 or "structured" not in case.param]
    async with neighbours.talking():
        faults = await run_http(server, kept)
        faults += await run_http(server, every(http_cases(), stride))
        faults += await run_grpc(server, every(grpc_cases(), stride))
        faults += await run_broken(server)
        await departures(server, 4 if stride > 1 else 40)
    assert neighbours.num_answers >= 10
    return faults + neighbours.faults


def survive(server: LiveServer, stride: int) -> None:
    core, resident = server.core_pid(), server.resident_bytes()
    rejected = server_errors(server)
    faults = asyncio.run(besiege(server, stride))
    assert not faults, "\n".join(faults)
    server.wait_idle()  # no request, no page; the core checks its own books when it is idle
    assert server.process.poll() is None
    assert server.core_pid() == core
    os.kill(core, 0)
    assert server_errors(server) == rejected
    assert "internal error" not in server.log.read_text()
    assert server.resident_bytes() - resident < MAX_GROWTH_BYTES


def server_errors(server: LiveServer) -> list[str]:
    """Counts of 5xx answers; /health gives some while the model loads."""
    lines = get(server.http + "/metrics")[1].splitlines()
    return [line for line in lines if line.startswith("http_requests_total") and "5xx" in line]


def test_hostile_requests(tiny: LiveServer) -> None:
    survive(tiny, STRIDE)


@pytest.mark.slow
def test_the_whole_corpus(tiny: LiveServer) -> None:
    assert len(list(http_cases())) + len(list(grpc_cases())) > 5000
    survive(tiny, 1)


def test_requests_must_arrive(tiny: LiveServer) -> None:
    """A byte now and then holds a connection for a while, not for ever."""
    answer, seconds = asyncio.run(dawdle(tiny, GOOD, gap=0.1))
    assert answer.status == 408
    assert "2 s" in answer.json()["error"]["message"]
    assert ARRIVAL_SECONDS <= seconds < 2 * ARRIVAL_SECONDS + 2
    answer, _ = asyncio.run(dawdle(tiny, GOOD, gap=0.002))
    assert answer.status == 200


def test_nan_in_one_request_is_counted_and_harms_no_other(tiny: LiveServer) -> None:
    body = {"prompt": [5, NAN_ID, 9], "max_tokens": 4}
    before = tiny.metric("vllm:corrupted_requests_total")

    async def ask_among_neighbours() -> list[str]:
        neighbours = Neighbours(tiny)
        await neighbours.listen_alone()
        async with neighbours.talking():
            for _ in range(5):
                answer = await ask_json(tiny.http_port, COMPLETIONS, body)
                assert answer.json()["choices"][0]["finish_reason"] == "error"
        return neighbours.faults

    assert asyncio.run(ask_among_neighbours()) == []
    assert tiny.metric("vllm:corrupted_requests_total") - before == 5


def test_a_client_that_stops_reading_costs_no_memory(tiny: LiveServer) -> None:
    """Megabytes of answer that nobody takes: the server makes events only as fast as they leave,
    and hangs up when it has waited long enough.
    """
    body = {"prompt": "ab", "n": 32, "max_tokens": 250, "ignore_eos": True, "stream": True}
    data = request_bytes(COMPLETIONS, json.dumps({**body, "logprobs": 20}).encode())
    with socket.create_connection(("127.0.0.1", tiny.http_port)) as deaf:
        deaf.sendall(data)
        wait_for(lambda: num_active(tiny) == 1, 10.0)
        wait_for(lambda: not any(tiny.load().values()), 60.0)  # the engine is done with it
        resident = tiny.resident_bytes()
        wait_for(lambda: num_active(tiny) == 0, 4 * UNREAD_SECONDS)
        growth = tiny.resident_bytes() - resident
        assert growth < 8 * 2**20  # the answer has 30 MB
        assert not read_rest(deaf).endswith(DONE)


def read_rest(sock: socket.socket) -> bytes:
    rest = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 20):
            rest += part
    return rest


def num_active(server: LiveServer) -> int:
    return json.loads(get(server.http + "/load")[1])["server_load"]


def test_a_full_queue_says_when_to_come_back(tiny: LiveServer) -> None:
    """More at once than may wait: refused with a hint, and those who wait are served."""

    async def flood() -> list[Answer]:
        body = {"prompt": "ab", "n": 128, "max_tokens": 8, "ignore_eos": True}
        return await asyncio.gather(
            *(ask_json(tiny.http_port, COMPLETIONS, body) for _ in range(12))
        )

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if answer.status == 429]
    assert refused and len(refused) < len(answers)
    assert all(answer.status in (200, 429) for answer in answers)
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert "waiting" in answer.json()["error"]["message"]
    tiny.wait_idle()
