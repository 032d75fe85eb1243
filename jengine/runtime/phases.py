"""Where the time of a start goes."""

import contextlib
import time
from collections.abc import Iterator


class Phases:
    """Seconds of each part of a start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @property
    def total(self) -> float:
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
