"""How a front end reaches an engine core: in a thread of this process, or in a process of its own.

Both clients deliver `FromCore` messages in order and in batches. If the core stops for any other
reason than `stop`, the last message is a `CoreDead`. `attach` makes an event loop the receiver;
`ThreadCoreClient.receive` is the blocking face, for `LLM`.
"""

import asyncio
import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq

from jengine.config import EngineConfig
from jengine.core_process import (
    STARTUP_CODE,
    Bootstrap,
    Core,
    from_core_address,
    resolve_factory,
    to_core_address,
)
from jengine.errors import UnsupportedError
from jengine.protocol import CoreDead, FromCore, Shutdown, ToCore

ENGINE_CORE = "jengine.engine:EngineCore"
JOIN_SECONDS = 10.0  # grace for a core that was told to stop; after it a process is killed
LAST_WORDS_SECONDS = (
    0.1  # how long messages of a dead child may still be on their way through the socket
)
MAX_FOLDER_PATH = 90  # a Unix socket's path holds 107 bytes

Deliver = Callable[[list[FromCore]], None]


class CoreClient(Protocol):
    """One engine core, seen from the front end. Only `join` may be called from another thread."""

    def attach(self, loop: asyncio.AbstractEventLoop, deliver: Deliver) -> None:
        """From now on call `deliver` on `loop` with what the core sends."""
        ...

    def send(self, message: ToCore) -> None:
        """Queue a message; never blocks. What is sent to a dead or stopped core is dropped."""
        ...

    def stop(self) -> None:
        """Tell the core to stop, and deliver nothing more. Idempotent."""
        ...

    def join(self) -> None:
        """After `stop`: block until the core has ended, and free what held it. Idempotent."""
        ...


class ThreadCoreClient:
    """An engine core in a daemon thread; messages pass by reference. `core` is the live object
    (notebooks).
    """

    def __init__(self, config: EngineConfig, core_factory: str = ENGINE_CORE) -> None:
        self._queue: queue.SimpleQueue[FromCore] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deliver: Deliver = _discard
        self._is_drain_scheduled = False
        self._is_stopped = False
        self.core: Core = resolve_factory(core_factory)(config, self._emit)
        self._thread = threading.Thread(target=self._run, name="engine-core", daemon=True)
        self._thread.start()

    def attach(self, loop: asyncio.AbstractEventLoop, deliver: Deliver) -> None:
        self._loop, self._deliver = loop, deliver
        loop.call_soon(self._drain)  # what came before the loop did

    def receive(self, timeout: float | None) -> list[FromCore]:
        """All messages that are there; waits for one at most `timeout` seconds (None: for ever)."""
        messages: list[FromCore] = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._queue.get(timeout=timeout))
            while True:
                messages.append(self._queue.get_nowait())
        return messages

    def send(self, message: ToCore) -> None:
        self.core.submit(message)

    def stop(self) -> None:
        if not self._is_stopped:
            self._is_stopped = True
            self.core.submit(Shutdown())

    def join(self) -> None:
        self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        try:
            self.core.run()
        finally:  # a core reports its own failures first; this speaks when it could not
            self._emit(CoreDead("the engine core's thread has ended"))

    def _emit(self, message: FromCore) -> None:
        self._queue.put(message)
        if self._loop is not None and not self._is_drain_scheduled:
            self._is_drain_scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._is_drain_scheduled = (
            False  # first: what is put after the queue was found empty schedules again
        )
        messages = self.receive(timeout=0.0)
        if messages and not self._is_stopped:
            self._deliver(messages)


class ProcessCoreClient:
    """An engine core in a child process: msgpack over two ZeroMQ sockets in a private folder."""

    def __init__(self, config: EngineConfig, core_factory: str = ENGINE_CORE) -> None:
        if not all(isinstance(source, str) for source in config.logits_processors):
            raise UnsupportedError(
                "logits_processors: a function cannot be sent to the engine's process: "
                "name it as 'module:function'"
            )
        self._folder = _private_folder()
        self._context = zmq.Context(io_threads=1)
        self._outbox = self._context.socket(zmq.PUSH)
        self._inbox = self._context.socket(zmq.PULL)
        for socket in (self._outbox, self._inbox):
            socket.set_hwm(
                0
            )  # no message is ever dropped; the bounded waiting queue keeps their number down
            socket.linger = 0
        self._outbox.bind(to_core_address(self._folder.name))
        self._inbox.bind(from_core_address(self._folder.name))
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deliver: Deliver = _discard
        self._has_died = False
        self._is_stopped = False
        self._child = _spawn(config, core_factory, self._folder.name)

    @property
    def pid(self) -> int:
        """Process id of the core."""
        return self._child.pid

    def attach(self, loop: asyncio.AbstractEventLoop, deliver: Deliver) -> None:
        self._loop, self._deliver = loop, deliver
        # Against a thread that reads and calls `call_soon_threadsafe`: 20% less CPU for one stream,
        # the same for 512. zmq.asyncio costs a task for each message.
        loop.add_reader(self._inbox.fileno(), self._drain)
        loop.call_soon(
            self._drain
        )  # the descriptor tells of changes only, and messages may be there already
        threading.Thread(target=self._watch_child, name="core-watch", daemon=True).start()

    def send(self, message: ToCore) -> None:
        if not self._is_stopped and not self._has_died:
            self._outbox.send(self._encoder.encode(message))

    def stop(self) -> None:
        if self._is_stopped:
            return
        self.send(Shutdown())
        self._is_stopped = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._inbox.fileno())

    def join(self) -> None:
        try:
            self._child.wait(JOIN_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._context.destroy(linger=0)
        self._folder.cleanup()

    def _drain(self) -> None:
        """Deliver everything that has arrived: a burst of messages costs one turn of the loop."""
        if self._is_stopped:
            return
        messages: list[FromCore] = []
        try:
            while True:
                messages.append(self._decoder.decode(self._inbox.recv(zmq.NOBLOCK)))
        except zmq.Again:
            pass
        except msgspec.DecodeError as error:  # better dead than half understood
            messages.append(CoreDead(f"the engine core sent an unreadable message: {error}"))
        if messages and not self._has_died:
            self._has_died = isinstance(messages[-1], CoreDead)
            self._deliver(messages)

    def _watch_child(self) -> None:
        """Own thread: `waitpid` returns the moment the child ends, on every platform."""
        code = self._child.wait()
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens any more
            self._loop.call_soon_threadsafe(
                self._loop.call_later, LAST_WORDS_SECONDS, self._on_exit, code
            )

    def _on_exit(self, code: int) -> None:
        self._drain()
        if not self._has_died and not self._is_stopped:
            self._has_died = True
            self._deliver(
                [CoreDead(f"the engine core's process has ended with {_describe_exit(code)}")]
            )


def _discard(messages: list[FromCore]) -> None:
    """Receiver before `attach`."""


def _private_folder() -> "tempfile.TemporaryDirectory[str]":
    folder = tempfile.TemporaryDirectory(prefix="jengine-")
    if len(folder.name) <= MAX_FOLDER_PATH:
        return folder
    folder.cleanup()
    return tempfile.TemporaryDirectory(prefix="jengine-", dir="/tmp")


def _spawn(config: EngineConfig, core_factory: str, folder: str) -> "subprocess.Popen[bytes]":
    bootstrap = Bootstrap(
        config=config,
        core_factory=core_factory,
        folder=folder,
        sys_path=[path or os.getcwd() for path in sys.path],
        log_level=logging.getLogger("jengine").getEffectiveLevel(),
        parent_pid=os.getpid(),
    )
    child = subprocess.Popen(
        [sys.executable, "-c", STARTUP_CODE],
        stdin=subprocess.PIPE,
        stdout=2,  # our standard error: standard output belongs to the front end
        start_new_session=True,  # Ctrl-C must not reach a child that is still importing
    )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died already; its exit code will tell
        child.stdin.write(msgspec.json.encode(bootstrap) + b"\n")
        child.stdin.flush()  # and stays open: its end of file tells the child that we are gone
    return child


def _describe_exit(code: int) -> str:
    return f"exit code {code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
