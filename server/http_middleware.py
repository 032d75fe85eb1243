"""Limits, keys, request ids and counting, as plain ASGI: no copy of the body, no extra task per
request.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jengine.errors import InvalidRequestError
from jengine.server.http_errors import error_body, json_response
from jengine.server.metrics import ServerMetrics
from jengine.server.state import check_request_id

# Probes carry no key.
OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/readyz", "/live", "/version"})
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 128


class LimitMiddleware:
    """Refuses large headers (431) and counts the body as it arrives (413), whatever its length
    header says.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if (
            len(headers) > MAX_HEADERS
            or sum(len(k) + len(v) for k, v in headers) > MAX_HEADER_BYTES
        ):
            refusal = json_response(error_body(431, "the request's headers are too large"), 431)
            await refusal(scope, receive, send)
            return
        declared = dict(headers).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_body_bytes:
            await self._too_large()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_body_bytes:
                    raise HTTPException(413, self._text)
            return message

        await self._app(scope, counted, send)

    @property
    def _text(self) -> str:
        return f"the request's body is larger than {self._max_body_bytes} bytes"

    def _too_large(self) -> Response:
        # Closing spares us from reading the rest.
        return json_response(error_body(413, self._text), 413, {"connection": "close"})


class KeyMiddleware:
    """Every path needs a key, unless it is in `OPEN_PATHS`. Decides on the raw path alone: URLs can
    be made to lie.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            headers = dict(scope["headers"])
            if not self._is_known(headers.get(b"authorization", b"")):
                refusal = json_response(
                    error_body(401, "missing or wrong API key"), 401, {"www-authenticate": "Bearer"}
                )
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_known(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


class CountMiddleware:
    """Counts and times each request, and hands `x-request-id` back."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, paths: Iterable[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 499
        request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        if request_id:
            try:
                check_request_id(request_id, "x-request-id")
            except InvalidRequestError as error:
                refusal = json_response(error_body(400, str(error), param=error.field), 400)
                await refusal(scope, receive, send)
                return

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if request_id:
                    echo = (b"x-request-id", request_id.encode("latin-1"))
                    message = {**message, "headers": [*message.get("headers", ()), echo]}
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            # Made-up paths and methods must not make series without end.
            is_known = scope["path"] in self._paths
            handler = scope["path"] if is_known else "none"
            method = scope["method"] if is_known and status != 405 else "none"
            self._metrics.http_requests.labels(handler, method, f"{status // 100}xx").inc()
            elapsed = time.perf_counter() - started
            self._metrics.http_duration.labels(handler, method).observe(elapsed)
