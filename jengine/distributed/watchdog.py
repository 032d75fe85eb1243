"""Ends a process whose step does not end, whatever its main thread is blocked in.

A rank that is stuck in a collective keeps its heartbeats up, and the others wait with it. So a step
has a bound. Two guards: a thread, which can say what happened; and a timer of the kernel behind it,
which needs no interpreter lock, in case native code blocks while it holds that.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from jengine.errors import ExitCode

POLL_SECONDS = 0.5
BACKSTOP_SECONDS = 5.0  # how much later the kernel's timer fires

Die = Callable[[int, str], object]


def end_process(exit_code: int, message: str) -> NoReturn:
    """At once, from any thread. No logging, no clean-up: the main thread may hold their locks."""
    with contextlib.suppress(OSError):
        os.write(2, f"jengine: fatal: {message}\n".encode())
    os._exit(exit_code)


class StepWatchdog:
    """`with watchdog.step("decode 64"):` around whatever must end within `limit` seconds, on one
    thread. The process ends with exit code 75 and the stacks of its threads on standard error; by
    SIGALRM if even that is not possible.
    """

    def __init__(
        self, limit: float, die: Die = end_process, *, backstop: float = BACKSTOP_SECONDS
    ) -> None:
        if limit <= 0:
            raise ValueError(f"a step's limit must be > 0 s, got {limit}")
        self._limit = limit
        self._die = die
        self._backstop = limit + backstop
        # One attribute: the other thread sees either both or neither.
        self._running: tuple[float, str] | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="step-watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._running = time.monotonic() + self._limit, name
        signal.setitimer(signal.ITIMER_REAL, self._backstop)
        try:
            yield
        finally:
            self._running = None
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def close(self) -> None:
        self._is_closed.set()
        self._thread.join()

    def _watch(self) -> None:
        interval = min(POLL_SECONDS, self._limit / 4)
        while not self._is_closed.wait(interval):
            running = self._running
            if running is not None and time.monotonic() > running[0]:
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    faulthandler.dump_traceback(sys.__stderr__.fileno())  # type: ignore[union-attr]
                self._die(ExitCode.RESTART, f"{running[1]} has not ended within {self._limit:g} s")
                return
