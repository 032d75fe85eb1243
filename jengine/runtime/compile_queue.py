"""Compilations by name in threads, in order: some may be waited for while the rest goes on."""

import collections
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

log = logging.getLogger(__name__)


class CompileQueue:
    """Runs `compile_(name)` for every name given to `start`.

    A thread takes one name and then comes back for the next, instead of the pool holding them all:
    so `wait` and `close` take effect, and an interpreter that exits waits for what is being
    compiled now but not for the rest.
    """

    def __init__(self, compile_: Callable[[str], object]) -> None:
        self._compile = compile_
        self._lock = threading.Lock()
        self._names: collections.deque[str] = collections.deque()
        self._futures: dict[str, Future[None]] = {}
        self.num_pending = 0
        self._pool: ThreadPoolExecutor | None = None
        self._when_done: list[Callable[[], object]] = []

    def start(self, names: Iterable[str], threads: int) -> None:
        """So many at once. Again only when all before are done."""
        with self._lock:
            assert not self.num_pending
            self._names.extend(names)
            self._futures |= {name: Future() for name in self._names}
            self.num_pending = len(self._names)
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")
        for _ in range(threads):
            self._run_next()

    def wait(self, names: Iterable[str]) -> None:
        """Until these are compiled, ahead of the others. Raises what `compile_` raised, or
        `CancelledError` after `close`.
        """
        for name in names:
            self._hurry(name)
            self._futures[name].result()

    def is_pending(self, name: str) -> bool:
        return name in self._futures and not self._futures[name].done()

    def failures(self) -> dict[str, str]:
        """What could not be compiled, and why."""
        ended = ((name, f) for name, f in self._futures.items() if f.done() and not f.cancelled())
        return {name: str(error) for name, f in ended if (error := f.exception()) is not None}

    def when_done(self, callback: Callable[[], object]) -> None:
        """Call it once nothing is pending: at once, or from a compiling thread."""
        with self._lock:
            if self.num_pending:
                self._when_done.append(callback)
                return
        callback()

    def close(self) -> None:
        """Start nothing more."""
        with self._lock:
            dropped, self._names = list(self._names), collections.deque()
            self.num_pending -= len(dropped)
        for name in dropped:
            self._futures[name].cancel()
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _hurry(self, name: str) -> None:
        with self._lock:
            if name in self._names:
                self._names.remove(name)
                self._names.appendleft(name)

    def _run_next(self) -> None:
        assert self._pool is not None
        with self._lock:
            if not self.num_pending:
                self._pool.shutdown(wait=False)
            if not self._names:
                return
            name = self._names.popleft()
        try:
            submitted = self._pool.submit(self._compile, name)
        except RuntimeError:  # closed, or the interpreter exits
            self._futures[name].cancel()
            return
        submitted.add_done_callback(lambda future: self._finish(name, future))

    def _finish(self, name: str, future: Future[object]) -> None:
        callbacks: list[Callable[[], object]] = []
        with self._lock:  # counted before anybody who waits goes on
            self.num_pending -= 1
            if not self.num_pending:
                callbacks, self._when_done = self._when_done, []
        error = future.exception()
        if error is None:
            self._futures[name].set_result(None)
        else:
            log.error("%s could not be compiled: %s", name, error)
            self._futures[name].set_exception(error)
        for callback in callbacks:
            callback()
        self._run_next()
