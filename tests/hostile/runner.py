"""Throws cases at a server while others talk to it, and says what was wrong."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from jengine.server.proto import engine_pb2 as pb
from tests.e2e.live import LiveServer
from tests.hostile.corpus import GrpcCase, HttpCase
from tests.hostile.wire import COMPLETIONS, Answer, ask, ask_json, request_bytes, tokens_of

NUM_AT_ONCE = 12
MAX_FAULTS = 200  # a dead server has one for each case
GENERATE = "/jengine.v1.Inference/Generate"
NEIGHBOURS: tuple[dict[str, Any], ...] = (
    {"prompt": "The quick brown fox jumps", "temperature": 0},
    {"prompt": "def add(a, b):", "temperature": 0, "stream": True},
    {"prompt": [7, 8, 9] * 20, "temperature": 1.0, "seed": 11, "stream": True},
    {"prompt": "naïve café", "temperature": 1.3, "seed": 5, "top_k": 40, "repetition_penalty": 1.2},
)
NUM_TOKENS = 40
SAME = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": True}


class Neighbours:
    """Normal clients. Each knows what it was answered when it was alone."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._expected: list[list[int]] = []
        self.num_answers = 0
        self.faults: list[str] = []

    async def listen_alone(self) -> None:
        self._expected = [await self._ask(index) for index in range(len(NEIGHBOURS) + 1)]
        assert all(len(tokens) == NUM_TOKENS for tokens in self._expected)

    @asynccontextmanager
    async def talking(self) -> AsyncIterator[None]:
        """Meanwhile they ask again and again; each at least once."""
        is_over = asyncio.Event()
        tasks = [asyncio.create_task(self._talk(i, is_over)) for i in range(len(self._expected))]
        try:
            yield
        finally:
            is_over.set()
            await asyncio.gather(*tasks)

    async def _talk(self, index: int, is_over: asyncio.Event) -> None:
        while True:
            try:
                tokens = await self._ask(index)
            except Exception as error:  # any is a fault of the server, and to be reported as one
                self.faults.append(f"neighbour {index}: {type(error).__name__}: {error}")
                return
            self.num_answers += 1
            if tokens != self._expected[index]:
                self.faults.append(f"neighbour {index}: {tokens} is not {self._expected[index]}")
            if is_over.is_set():
                return
            await asyncio.sleep(0.05)

    async def _ask(self, index: int) -> list[int]:
        if index == len(NEIGHBOURS):
            return await self._ask_grpc()
        body = {**SAME, **NEIGHBOURS[index]}
        return tokens_of(await ask_json(self._server.http_port, COMPLETIONS, body))

    async def _ask_grpc(self) -> list[int]:
        request = pb.GenerateRequest(
            text="for i in range(10):",
            sampling=pb.SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True),
        )
        async with grpc.aio.insecure_channel(self._server.grpc) as channel:
            call = channel.unary_stream(
                GENERATE,
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            return [i async for response in call(request) for i in response.token_ids]


async def run_http(server: LiveServer, cases: Iterable[HttpCase]) -> list[str]:
    """What was wrong, one line for each case."""

    async def one(case: HttpCase) -> str:
        data = request_bytes(case.path, case.body, method=case.method, headers=case.headers)
        answer: Answer = await ask(server.http_port, data)
        return case.verdict(answer)

    return await _all(cases, one)


async def run_grpc(server: LiveServer, cases: Iterable[GrpcCase]) -> list[str]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(server.grpc, options) as channel:

        async def one(case: GrpcCase) -> str:
            kind: Any = channel.unary_stream if case.streams else channel.unary_unary
            call = kind(case.method)(case.payload, metadata=case.metadata, timeout=case.timeout)
            try:
                if not case.streams:
                    await call
                else:
                    count = 0
                    if case.cancel_after == 0:
                        call.cancel()
                    async for _ in call:
                        count += 1
                        if count == case.cancel_after:
                            call.cancel()
            except (grpc.RpcError, asyncio.CancelledError):
                pass
            return case.verdict(await call.code(), await call.details() or "")

        return await _all(cases, one)


async def _all(cases: Iterable[Any], one: Any) -> list[str]:
    remaining = iter(cases)
    faults: list[str] = []

    async def worker() -> None:
        for case in remaining:
            if len(faults) > MAX_FAULTS:
                return
            try:
                fault = await one(case)
            except Exception as error:  # an answer that cannot be read is the server's fault, too
                fault = f"{type(error).__name__}: {error}"
            if fault:
                faults.append(f"{case.name}: {fault}")

    await asyncio.gather(*(worker() for _ in range(NUM_AT_ONCE)))
    return faults


def every(cases: Iterable[Any], stride: int) -> list[Any]:
    """The same sample each time: for runs that have seconds only."""
    return list(itertools.islice(cases, stride // 2, None, stride))


async def leave_at(server: LiveServer, data: bytes, sent: int, received: int) -> None:
    """Send the first `sent` bytes, wait for `received`, hang up with a reset."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    writer.write(data[:sent])
    with contextlib.suppress(ConnectionError, TimeoutError):
        await writer.drain()
        async with asyncio.timeout(5):
            while received > 0 and (part := await reader.read(received)):
                received -= len(part)
    writer.transport.abort()


async def departures(server: LiveServer, count: int) -> None:
    """Clients that leave at every stage: in the head, in the body, before and within the answer."""
    for stream in (False, True):
        body = json.dumps({"prompt": "ab", "max_tokens": 200, "stream": stream, "n": 2}).encode()
        data = request_bytes(COMPLETIONS, body)
        stages = [(len(data) * i // count, 0) for i in range(1, count + 1)]
        stages += [(len(data), 1 + 400 * i) for i in range(count)]
        await asyncio.gather(*(leave_at(server, data, *stage) for stage in stages))
