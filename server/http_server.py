"""The HTTP port: OpenAI's API and vLLM's small routes, on Starlette and uvicorn."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from jengine import __version__
from jengine.server.http_errors import HANDLERS, error_body, json_response
from jengine.server.http_io import CLIENT_CLOSED_REQUEST, ClientGoneError
from jengine.server.http_middleware import CountMiddleware, KeyMiddleware, LimitMiddleware
from jengine.server.http_protocol import guarded
from jengine.server.http_text import detokenize, tokenize, tokenizer_info
from jengine.server.openai_chat import chat_completions
from jengine.server.openai_completions import completions
from jengine.server.settings import ServerSettings
from jengine.server.state import ServerState, Status

KEEP_ALIVE_SECONDS = 65  # longer than the idle limit of common load balancers
GRACEFUL_SECONDS = 5  # for last bytes: requests were drained before
BACKLOG = 2048


def create_app(state: ServerState) -> Starlette:
    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
        Route("/health", health),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/ready", health),
        Route("/readyz", health),
        Route("/live", live),
        Route("/version", show_version),
        Route("/load", load),
        Route("/metrics", metrics),
    ]
    settings = state.settings
    paths = [route.path for route in routes]
    middleware = [Middleware(CountMiddleware, metrics=state.metrics, paths=paths)]
    if settings.api_keys:
        middleware.append(Middleware(KeyMiddleware, keys=settings.api_keys))
    middleware.append(Middleware(LimitMiddleware, max_body_bytes=settings.max_body_bytes))
    # The second is Starlette's, for a client that leaves within its body.
    handlers = {**HANDLERS, ClientGoneError: on_client_gone, ClientDisconnect: on_client_gone}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.state.server = state
    return app


class HttpServer:
    """uvicorn on a socket of ours, inside a loop and under signal handlers that are not its own."""

    def __init__(self, state: ServerState) -> None:
        settings = state.settings
        self._uds = None if settings.uds is None else Path(settings.uds)
        self._socket = open_socket(settings)
        is_unix = self._socket.family == socket.AF_UNIX
        # What was drawn, for port 0; a Unix socket has none.
        self.port: int = 0 if is_unix else self._socket.getsockname()[1]
        self._server = QuietServer(
            uvicorn.Config(
                create_app(state),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                http=guarded(settings.arrival_timeout, settings.unread_timeout),
                ws="none",
                root_path=settings.root_path,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=GRACEFUL_SECONDS,
                ssl_keyfile=_text(settings.ssl_keyfile),
                ssl_certfile=_text(settings.ssl_certfile),
                ssl_ca_certs=_text(settings.ssl_ca_certs),
            )
        )

    async def serve(self) -> None:
        """Until `stop`; then until open connections are done."""
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            if self._uds is not None:
                self._uds.unlink(missing_ok=True)

    def stop(self, *, force: bool = False) -> None:
        self._server.should_exit = True
        self._server.force_exit = force


async def models(request: Request) -> Response:
    state: ServerState = request.app.state.server
    info = state.ready_engine().model_info
    created = int(time.time() - state.uptime_seconds)
    cards = [
        {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "jengine",
            "root": info.model,
            "parent": None,
            "max_model_len": info.max_model_len,
        }
        for name in info.served_model_names
    ]
    return json_response({"object": "list", "data": cards})


async def health(request: Request) -> Response:
    """200 while new requests are taken; 503 while loading, draining, or dead."""
    status = request.app.state.server.status
    if status is Status.SERVING:
        return Response(status_code=200)
    body = error_body(503, f"the server is {status.value}", "ServiceUnavailableError")
    return json_response(body, 503, {"retry-after": "1"})


async def live(request: Request) -> Response:
    """200 while a restart would not help: also while loading and draining. 503 once dead."""
    status = request.app.state.server.status
    return json_response({"status": status.value}, 503 if status is Status.DEAD else 200)


async def show_version(request: Request) -> Response:
    return json_response({"version": __version__})


async def load(request: Request) -> Response:
    return json_response({"server_load": request.app.state.server.num_active})


async def metrics(request: Request) -> Response:
    body = request.app.state.server.metrics.render()
    return Response(body, headers={"content-type": CONTENT_TYPE_LATEST})


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; the status is for the counters."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def open_socket(settings: ServerSettings) -> socket.socket:
    """Bound before the model loads, so that a taken port is known at once."""
    if settings.uds is not None:
        listener, address = socket.socket(socket.AF_UNIX), settings.uds
    else:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener, address = socket.socket(family), (settings.host, settings.port)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


class QuietServer(uvicorn.Server):
    """Leaves signals to `app.ServerApp`: uvicorn would exit with 143 after a drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _text(path: Any) -> str | None:
    return None if path is None else str(path)
