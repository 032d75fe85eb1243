"""A whole server in this process: real protocols, real `AsyncEngine`, and the echo core instead of
a model.
"""

import asyncio
import dataclasses
import functools
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jengine.async_engine import AsyncEngine
from jengine.config import EngineConfig
from jengine.server.app import ServerApp
from jengine.server.settings import ServerSettings
from tests.oracles.echo_core import FACTORY

START_SECONDS = 30.0
MODEL_NAME = "echo"


class RunningServer:
    """`app` lives on a loop in a thread; `call` runs a coroutine there."""

    def __init__(self, app: ServerApp, loop: asyncio.AbstractEventLoop) -> None:
        self.app = app
        self.loop = loop
        self.exit_code: int | None = None
        self.ended = threading.Event()

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.app.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.app.grpc_port}"

    @property
    def engine(self) -> AsyncEngine:
        assert self.app.state.engine is not None
        return self.app.state.engine

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(START_SECONDS)

    def utility(self, method: str) -> Any:
        return self.call(self.engine.call_utility(method))

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.app.request_stop)

    def wait_idle(self, seconds: float = 5.0) -> None:
        """Until neither the front end nor the core has a request; fails after `seconds`."""
        wait_for(lambda: self.app.state.num_active == 0 and not self.utility("running"), seconds)


@contextmanager
def echo_server(
    folder: Path,
    *,
    behaviour: dict[str, Any] | None = None,
    in_process: bool = True,
    wait_ready: bool = True,
    max_num_waiting: int = 4096,
    max_model_len: int = 256,
    **settings: Any,
) -> Iterator[RunningServer]:
    """Start, wait until it serves, stop."""
    config = EngineConfig.from_kwargs(
        str(folder),
        served_model_name=(MODEL_NAME, "alias"),
        hf_overrides={"echo": behaviour or {}},
        load_format="dummy",
        max_model_len=max_model_len,
        max_num_waiting=max_num_waiting,
    )
    create = functools.partial(AsyncEngine.create, in_process=in_process, core_factory=FACTORY)
    options = ServerSettings(port=0, grpc_port=0, shutdown_timeout=5.0, dead_linger=2.0)
    options = dataclasses.replace(options, **settings)
    box: list[RunningServer] = []
    listening = threading.Event()

    async def main() -> None:
        app = ServerApp(config, options, create_engine=create)
        server = RunningServer(app, asyncio.get_running_loop())
        box.append(server)
        try:
            server.exit_code = await app.run(listening.set)
        finally:
            server.ended.set()

    thread = threading.Thread(target=asyncio.run, args=(main(),), name="server")
    thread.start()
    assert listening.wait(START_SECONDS), "the server did not come up"
    server = box[0]
    try:
        if wait_ready:
            wait_for(lambda: get(server.http + "/health")[0] == 200, START_SECONDS)
        yield server
    finally:
        if not server.ended.is_set():
            server.stop()
        thread.join(START_SECONDS)
        assert not thread.is_alive(), "the server did not stop"


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.02)


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def post(
    url: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, decoded JSON, headers. A `bytes` body is sent as it is."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"null"), dict(error.headers)


def events(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All data objects of an event stream; checks framing and the final [DONE]."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = response.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    chunks = [part for part in text.split("\n\n") if part and not part.startswith(":")]
    assert all(chunk.startswith("data: ") for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks[:-1]]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
