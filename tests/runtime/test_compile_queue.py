"""Order, waiting, hurrying, failing and closing, with compilations that a test holds back."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest

from jengine.runtime.compile_queue import CompileQueue

SECONDS = 10.0


class Compiler:
    """`compile_` of a queue: notes what begins, and waits for leave."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._may_end = threading.Semaphore(0)
        self._begins = threading.Semaphore(0)

    def __call__(self, name: str) -> None:
        with self._lock:
            self.begun.append(name)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        self._begins.release()
        assert self._may_end.acquire(timeout=SECONDS)
        with self._lock:
            self._now -= 1
        if name.startswith("bad"):
            raise ValueError(f"{name} is no program")

    def await_begun(self, count: int) -> None:
        for _ in range(count):
            assert self._begins.acquire(timeout=SECONDS)

    def let_end(self, count: int = 1) -> None:
        self._may_end.release(count)


def start(names: str, threads: int) -> tuple[CompileQueue, Compiler]:
    compiler = Compiler()
    queue = CompileQueue(compiler)
    queue.start(names.split(), threads)
    return queue, compiler


def ended(queue: CompileQueue) -> threading.Event:
    done = threading.Event()
    queue.when_done(done.set)
    return done


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_in_order_and_so_many_at_once() -> None:
    queue, compiler = start("a b c d e", threads=2)
    compiler.await_begun(2)
    assert queue.num_pending == 5
    assert sorted(compiler.begun) == ["a", "b"]
    done = ended(queue)
    compiler.let_end(5)
    queue.wait("abcde")
    assert done.wait(SECONDS)
    assert sorted(compiler.begun[:2]) == ["a", "b"]
    assert sorted(compiler.begun) == list("abcde")
    assert compiler.most_at_once == 2
    assert queue.num_pending == 0
    assert not queue.is_pending("a")


def test_who_waits_goes_first() -> None:
    queue, compiler = start("a b c d", threads=1)
    compiler.await_begun(1)
    waiter = in_thread(lambda: queue.wait(["d"]))
    while queue._names[0] != "d":  # until the waiter has spoken
        pass
    compiler.let_end(2)
    waiter.join(SECONDS)
    assert compiler.begun[:2] == ["a", "d"]
    compiler.let_end(2)
    queue.wait("bc")


def test_more_names_later_with_other_threads() -> None:
    queue, compiler = start("a b c", threads=3)
    compiler.let_end(3)
    queue.wait("abc")
    compiler.most_at_once = 0
    queue.start("def", 1)
    done = ended(queue)
    compiler.let_end(3)
    assert done.wait(SECONDS)
    assert compiler.begun[3:] == ["d", "e", "f"]
    assert compiler.most_at_once == 1


def test_a_failure_reaches_who_waits_and_nobody_else() -> None:
    queue, compiler = start("good bad fine", threads=1)
    done = ended(queue)
    compiler.let_end(3)
    with pytest.raises(ValueError, match="no program"):
        queue.wait(["bad"])
    queue.wait(["good", "fine"])
    assert done.wait(SECONDS)
    assert queue.failures() == {"bad": "bad is no program"}


def test_closing_drops_what_has_not_begun() -> None:
    queue, compiler = start("a b c", threads=1)
    compiler.await_begun(1)
    queue.close()
    assert queue.num_pending == 1
    with pytest.raises(CancelledError):
        queue.wait(["c"])
    compiler.let_end()
    queue.wait(["a"])
    assert compiler.begun == ["a"]
    assert queue.failures() == {}


def test_nothing_to_do_is_done() -> None:
    queue, _ = start("", threads=2)
    assert ended(queue).is_set()
    queue.close()
