"""The engine core as a process of its own: the other end of `ProcessCoreClient`.

Started as a fresh interpreter (no fork, and no second import of the user's `__main__`). A
`Bootstrap` comes as one line of JSON on standard input; after that, standard input stays open and
silent for as long as the parent lives: its end of file is the death notice. Messages run over two
ZeroMQ sockets in the parent's private folder.
"""

import gc
import importlib
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from jengine.config import EngineConfig
from jengine.protocol import CoreDead, CoreReady, FromCore, ToCore

logger = logging.getLogger(__name__)

STDIN_FD = 0
PARENT_POLL_MS = 1000
LINGER_MS = 1000
EXIT_DEAD = 1  # the core failed, and said so in CoreDead
EXIT_ORPHANED = 3  # the parent is gone
# What the child's interpreter runs. It takes over the parent's sys.path, so that both import the
# same jengine.
STARTUP_CODE = (
    "import json, sys; line = sys.stdin.buffer.readline(); "
    "sys.path[:] = json.loads(line)['sys_path']; "
    "from jengine.core_process import main; main(line)"
)


class Core(Protocol):
    """What `jengine.engine.EngineCore` offers its host, be it a thread or a process."""

    def submit(self, message: ToCore) -> None:
        """Queue a message; safe from any thread."""
        ...

    def run(self) -> None:
        """Load, send `CoreReady`, serve until `Shutdown`; a failure is sent as `CoreDead`."""
        ...


CoreFactory = Callable[[EngineConfig, Callable[[FromCore], None]], Core]


class Bootstrap(msgspec.Struct):
    """First line on the child's standard input."""

    config: EngineConfig
    core_factory: str  # "module:name"
    folder: str  # holds the sockets
    sys_path: list[str]
    log_level: int
    parent_pid: int


def to_core_address(folder: str) -> str:
    return f"ipc://{folder}/to_core"


def from_core_address(folder: str) -> str:
    return f"ipc://{folder}/from_core"


def resolve_factory(name: str) -> CoreFactory:
    """`"module:name"` -> the object. By name, so that a front end whose core is a process never
    imports jax.
    """
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def main(line: bytes) -> None:
    """Run a core until `Shutdown`, its failure, or the parent's end. Does not return."""
    # A terminal's Ctrl-C and a supervisor's SIGTERM reach the whole group; it is the parent that
    # drains.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    bootstrap = msgspec.json.decode(line, type=Bootstrap)
    logging.basicConfig(format="%(asctime)s %(levelname)s core: %(message)s")
    logging.getLogger("jengine").setLevel(bootstrap.log_level)
    context = zmq.Context(io_threads=1)
    outbox = context.socket(zmq.PUSH)
    outbox.set_hwm(
        0
    )  # never blocks the engine's loop: the number of requests bounds what can queue up
    outbox.linger = LINGER_MS
    outbox.connect(from_core_address(bootstrap.folder))
    encoder = msgspec.msgpack.Encoder()
    exit_code = 0

    def emit(message: FromCore) -> None:
        nonlocal exit_code
        if isinstance(message, CoreDead):
            exit_code = EXIT_DEAD
        elif isinstance(message, CoreReady):
            # What start-up made stays. A full collection that walks over all of it (JAX's modules,
            # the model's graph) stops the engine for 100 ms.
            gc.freeze()
        outbox.send(encoder.encode(message))

    core = resolve_factory(bootstrap.core_factory)(bootstrap.config, emit)
    threading.Thread(
        target=_read_messages, args=(bootstrap, core), name="core-inbox", daemon=True
    ).start()
    core.run()
    outbox.close()
    context.term()  # waits until the last messages, CoreDead among them, have left
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        exit_code
    )  # the inbox thread still waits on its socket, and nothing here needs an orderly end


def _read_messages(bootstrap: Bootstrap, core: Core) -> None:
    """Hand messages to the core until the parent is gone; then end the process."""
    inbox = zmq.Context(io_threads=1).socket(zmq.PULL)
    inbox.set_hwm(0)
    inbox.connect(to_core_address(bootstrap.folder))
    decoder = msgspec.msgpack.Decoder(ToCore)
    poller = zmq.Poller()
    poller.register(inbox, zmq.POLLIN)
    poller.register(STDIN_FD, zmq.POLLIN)
    while True:
        ready = dict(poller.poll(PARENT_POLL_MS))
        # The parent's id is compared, too: a process that the parent forked may hold our standard
        # input open.
        if STDIN_FD in ready or os.getppid() != bootstrap.parent_pid:
            logger.warning("the parent process is gone: exiting")
            shutil.rmtree(Path(bootstrap.folder), ignore_errors=True)
            os._exit(EXIT_ORPHANED)
        if inbox in ready:
            core.submit(decoder.decode(inbox.recv()))
