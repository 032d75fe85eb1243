"""Checker: from what a client asked for to a grammar that an engine may compile, or a refusal.

The front end's half of structured outputs. llguidance runs in a process of its own
(`check_process.py`), which is started with the first grammar.
"""

import collections
import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import msgspec

from jengine.errors import EngineDeadError, InvalidRequestError, UnsupportedError
from jengine.grammar import limits
from jengine.structured_outputs import FIELD, StructuredOutputsParams

# What the process' interpreter runs: it takes over the parent's sys.path.
STARTUP_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.stdin.buffer.readline()); "
    "from jengine.grammar.check_process import main; main()"
)
LENGTH_BYTES = 4
START_SECONDS = 60.0  # until the process has read the vocabulary
NUM_REMEMBERED = 256  # verdicts, the last ones used


class VocabularyFacts(msgspec.Struct, array_like=True):
    """What `Vocabulary` is made from."""

    table: list[bytes]
    special_ids: list[int]
    eos_ids: list[int]
    vocab_size: int


class Verdict(msgspec.Struct, array_like=True):
    """Of one grammar: its text for llguidance, or what is wrong with it."""

    grammar: str = ""
    error: str = ""


def pack(message: msgspec.Struct) -> bytes:
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


class Checker:
    """Thread-safe; one grammar is checked at a time. `read_facts` is called with the first one."""

    def __init__(self, read_facts: Callable[[], VocabularyFacts]) -> None:
        self._read_facts = read_facts
        self._lock = threading.Lock()
        self._known: collections.OrderedDict[bytes, Verdict] = collections.OrderedDict()
        self._process: _Process | None = None
        self._is_closed = False

    def check(self, params: StructuredOutputsParams) -> str:
        """The grammar's text for the engine. Raises `InvalidRequestError`; blocks for some
        milliseconds, for a second with the first grammar, for `CHECK_SECONDS` at most.
        """
        field = f"{FIELD}.{params.kind}"
        try:
            source = msgspec.msgpack.encode(params)
        except RecursionError:
            raise InvalidRequestError(field, "is nested too deeply") from None
        if len(source) > limits.MAX_SOURCE_BYTES:
            raise InvalidRequestError(
                field, f"holds {len(source)} bytes; the limit is {limits.MAX_SOURCE_BYTES}"
            )
        with self._lock:
            verdict = self._known.get(source) or self._ask(field, params)
            self._known[source] = verdict
            self._known.move_to_end(source)
            if len(self._known) > NUM_REMEMBERED:
                self._known.popitem(last=False)
        if verdict.error:
            raise InvalidRequestError(field, verdict.error)
        return verdict.grammar

    def close(self) -> None:
        """End the process; whoever waits for it is refused. Idempotent."""
        self._is_closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._stop()

    def _ask(self, field: str, params: StructuredOutputsParams) -> Verdict:
        if self._is_closed:
            raise EngineDeadError("the engine was shut down")
        if self._process is not None and not self._process.is_alive:
            self._stop()  # somebody else ended it
        if self._process is None:
            self._process = _Process(self._read_facts())
        # What the process did not survive is not remembered: the machine may just be busy.
        try:
            return self._process.ask(params, limits.CHECK_SECONDS)
        except TimeoutError:
            self._stop()
            raise InvalidRequestError(
                field, f"takes longer than {limits.CHECK_SECONDS:g} s to compile"
            ) from None
        except EOFError:
            self._stop()
            megabytes = limits.CHECK_MEMORY_BYTES // 2**20
            raise InvalidRequestError(
                field, f"cannot be compiled in {megabytes} MB of memory"
            ) from None

    def _stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None


class _Process:
    """A running check process."""

    def __init__(self, facts: VocabularyFacts) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise InvalidRequestError(FIELD, "needs the package 'llguidance' on the server")
        self._child = subprocess.Popen(
            [sys.executable, "-c", STARTUP_CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # panics of the library are told in its results, too
        )
        self.stop = weakref.finalize(self, _end, self._child)
        assert self._child.stdin is not None and self._child.stdout is not None
        self._stdin, self._stdout = self._child.stdin, self._child.stdout
        try:
            self._stdin.write(json.dumps(sys.path).encode() + b"\n")
            self._send(facts)
            self._receive(START_SECONDS)
        except (OSError, EOFError, TimeoutError) as error:
            self.stop()
            raise UnsupportedError(
                f"the process that checks grammars did not start: {error!r}"
            ) from error

    @property
    def is_alive(self) -> bool:
        return self._child.poll() is None

    def kill(self) -> None:
        """Thread-safe."""
        self._child.kill()

    def ask(self, params: StructuredOutputsParams, seconds: float) -> Verdict:
        try:
            self._send(params)
        except OSError as error:
            raise EOFError from error
        return msgspec.msgpack.decode(self._receive(seconds), type=Verdict)

    def _send(self, message: msgspec.Struct) -> None:
        self._stdin.write(pack(message))
        self._stdin.flush()

    def _receive(self, seconds: float) -> bytes:
        """One message. Raises `TimeoutError`, and `EOFError` if the process has ended."""
        deadline = time.monotonic() + seconds
        data = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while len(data) < LENGTH_BYTES or len(data) < LENGTH_BYTES + _length(data):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TimeoutError
                chunk = os.read(self._stdout.fileno(), 1 << 20)
                if not chunk:
                    raise EOFError
                data += chunk
        return data[LENGTH_BYTES:]


def _length(data: bytes) -> int:
    return int.from_bytes(data[:LENGTH_BYTES], "big")


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what could not be sent any more
                pipe.close()
