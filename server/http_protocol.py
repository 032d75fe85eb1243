"""What uvicorn leaves to a proxy: bounds on the head of a request, on the time that a request takes
to arrive, and on the time that its client may leave an answer unread.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jengine.server.http_errors import error_body

# Above what `LimitMiddleware` refuses with a better answer.
MAX_HEAD_BYTES = 128 * 1024
READ_SECONDS = 0.2
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


def guarded(arrival_seconds: float, unread_seconds: float) -> type[HttpToolsProtocol]:
    """The class of connections with these limits: uvicorn makes one without arguments of ours."""

    class Guarded(GuardedProtocol):
        _arrival_seconds = arrival_seconds
        _unread_seconds = unread_seconds

    return Guarded


class GuardedProtocol(HttpToolsProtocol):
    """A connection that waits for nothing for ever."""

    _arrival_seconds: float
    _unread_seconds: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._is_in_head = True
        self._arrival: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrival = _cancelled(self._arrival)
        self._unread = _cancelled(self._unread)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._head_bytes = True, 0
        if self._arrival is None:
            self._await_request()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._arrival = _cancelled(self._arrival)
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = _cancelled(self._unread)
        self._unread = self.loop.call_later(self._unread_seconds, self._drop)

    def resume_writing(self) -> None:
        self._unread = _cancelled(self._unread)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """In the form that all refusals have."""
        self._refuse(400, msg)

    def _await_request(self) -> None:
        self._arrival = self.loop.call_later(self._arrival_seconds, self._on_late)

    def _on_late(self) -> None:
        if self.flow.read_paused:  # it is we who do not read
            self._await_request()
        else:  # a loop that was held up runs its timers before it reads what has long been there
            self._arrival = self.loop.call_later(READ_SECONDS, self._refuse_late)

    def _refuse_late(self) -> None:
        self._arrival = None
        self._refuse(408, f"the request took longer than {self._arrival_seconds:g} s to arrive")

    def _drop(self) -> None:
        """The client has read nothing for so long: closing would wait for it to read the rest."""
        self._unread = None
        self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            body = msgspec.json.encode(error_body(status, message, param="body"))
            head = (
                f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
