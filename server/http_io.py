"""Reading a request, writing an event stream, and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jengine.errors import InvalidRequestError, JengineError
from jengine.server.http_errors import describe, from_validation

logger = logging.getLogger(__name__)

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
CLIENT_CLOSED_REQUEST = 499  # nginx's word for it; seen in logs and metrics only
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Closable(Protocol):
    """What the events are made from."""

    async def aclose(self) -> None: ...


class ClientGoneError(Exception):
    """Nobody is left to answer."""


async def read_body(request: Request, kind: type[T]) -> T:
    """The JSON body as `kind`. Raises `InvalidRequestError` naming the field, or 415."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPException(415, "Content-Type must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "compressed bodies are not accepted")
    body = await request.body()
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise from_validation(error) from None
    except RecursionError:
        raise InvalidRequestError("body", "is nested too deeply") from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, cancelling it when the client disconnects: servers do not do that for plain
    handlers.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        await _cancel(task, watcher)


class EventStream(Response):
    """Server-sent events from an async generator of encoded events, which is closed when the client
    goes away.

    A class of its own because Starlette's watches for a disconnect only with some servers, and
    because long silences (a queued request, a long prompt) need comment lines to keep proxies and
    peers awake.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: Closable, ping_seconds: float
    ) -> None:
        self._events = events
        self._source = source
        self._ping_seconds = ping_seconds
        self._last_sent = 0.0
        self.status_code = 200
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        writer = asyncio.ensure_future(self._write(send))
        watcher = asyncio.ensure_future(self._watch(receive, send))
        try:
            await asyncio.wait((writer, watcher), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
                await send({"type": "http.response.body", "body": b""})
        except OSError:
            logger.debug("the client left while it was being written to")
        finally:
            await _cancel(writer, watcher)
            await self._events.aclose()
            await (
                self._source.aclose()
            )  # closing a generator that never ran does not reach its source

    async def _write(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._last_sent = loop.time()
        except (JengineError, TimeoutError) as error:  # the status line is long gone
            body, _ = describe(error)
            event = b"data: " + msgspec.json.encode(body) + b"\n\n" + DONE
            await send({"type": "http.response.body", "body": event, "more_body": True})

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Returns when the client has gone; meanwhile writes comments into silences."""
        loop = asyncio.get_running_loop()
        self._last_sent = loop.time()
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while not gone.done():
                await asyncio.wait((gone,), timeout=self._ping_seconds)
                if not gone.done() and loop.time() - self._last_sent >= self._ping_seconds:
                    await send({"type": "http.response.body", "body": PING, "more_body": True})
        finally:
            await _cancel(gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel and wait, so that what the tasks hold is released before we go on."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
