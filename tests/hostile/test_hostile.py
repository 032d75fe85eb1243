"""Nothing kills it: hostile clients beside normal ones."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live import LiveServer, live_server
from tests.hostile.grpc_cases import grpc_cases
from tests.hostile.http_cases import hand_made, http_cases
from tests.hostile.runner import Neighbours, departures, every, run_grpc, run_http
from tests.hostile.sockets import GOOD, dawdle, run_broken
from tests.server.harness import get

ARRIVAL_SECONDS = 2.0
FLAGS = ("--max-model-len", "256", "--arrival-timeout", str(ARRIVAL_SECONDS))
MAX_GROWTH_BYTES = (
    600 * 2**20
)  # buckets and grammars used for the first time; the soak looks closer
STRIDE = 50  # of the default run


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    log = tmp_path_factory.mktemp("hostile") / "server.log"
    with live_server(log, *FLAGS, model=str(tiny_llama)) as server:
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
