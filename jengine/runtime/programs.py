"""The executables of one runner: a step for each bucket, `score` and `set_row`. Compiled ahead,
kept on disk.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jengine.layers.sampling import Logprobs, RowState
from jengine.runtime.aot import ExecutableStore
from jengine.runtime.batch import BatchLayout
from jengine.runtime.buckets import Bucket
from jengine.runtime.step import (
    KV,
    StepOutput,
    StepSpec,
    build_score,
    build_step,
    set_pages,
    set_row,
)

log = logging.getLogger(__name__)

SCORE_ROWS = 64  # prompt positions scored by one call
SCORE, SET_ROW, SET_PAGES = "score", "set_row", "set_pages"


class Programs:
    """Name -> executable. After `warm_up` a compilation is a fault: it is counted and logged."""

    def __init__(
        self,
        spec: StepSpec,
        layouts: Mapping[Bucket, BatchLayout],
        store: ExecutableStore,
        arguments: tuple[tuple[jax.Array, ...], KV, RowState],
        hidden: jax.ShapeDtypeStruct,
    ) -> None:
        """`arguments` give shapes only; `hidden` is one row [D] of final hidden states."""
        self._spec = spec
        self._layouts = {str(bucket): layout for bucket, layout in layouts.items()}
        self._store = store
        self._leaves, self._kv, self._rows = (jax.tree.map(_abstract, x) for x in arguments)
        self._hidden = hidden
        self._ready: dict[str, jax.stages.Compiled] = {}
        self._lock = threading.Lock()
        self._is_warm = False
        self.warm_up_seconds = 0.0
        self.num_late = 0

    def warm_up(self, threads: int) -> None:
        """Prepare everything, largest first: the longest compilation should not be the last to
        start.
        """
        started = time.perf_counter()
        names = [*sorted(self._layouts, key=_size_of_name, reverse=True), SCORE, SET_ROW, SET_PAGES]
        with ThreadPoolExecutor(threads) as pool:
            prepared = pool.map(self._prepare, names)
            collections.deque(
                tqdm(prepared, "executables", len(names), leave=False, disable=None), maxlen=0
            )
        self._is_warm = True
        self.warm_up_seconds = time.perf_counter() - started
        log.info(
            "%d executables ready in %.1f s (%d compiled)",
            len(names),
            self.warm_up_seconds,
            self._store.num_compiled,
        )

    def __getitem__(self, name: str) -> jax.stages.Compiled:
        if name not in self._ready:
            self._prepare(name)
        return self._ready[name]

    @property
    def num_compiled(self) -> int:
        """Executables that were not found on disk."""
        return self._store.num_compiled

    @property
    def ready(self) -> Mapping[str, jax.stages.Compiled]:
        return self._ready

    def _prepare(self, name: str) -> str:
        if self._is_warm:
            self.num_late += 1
            log.warning("compiling %s after warm-up", name)
        function, donated, arguments, result = self._program(name)
        structure = jax.tree.structure((arguments, {})), jax.tree.structure(result)

        def compile_() -> jax.stages.Compiled:
            # Tracing holds the interpreter lock anyway; one trace at a time keeps its caches safe.
            with self._lock:
                lowered = jax.jit(function, donate_argnames=donated).lower(*arguments)
            return lowered.compile()

        self._ready[name] = self._store.get(name, structure, compile_)
        return name

    def _program(self, name: str) -> tuple[Callable[..., Any], Sequence[str], tuple[Any, ...], Any]:
        """(function, donated arguments, abstract arguments, a tree shaped like the result)."""
        scores = Logprobs(0, 0, 0, 0)  # type: ignore[arg-type]
        if name == SCORE:
            hidden = jax.ShapeDtypeStruct((SCORE_ROWS, *self._hidden.shape), self._hidden.dtype)
            arguments = (self._leaves, hidden, _i32(SCORE_ROWS))
            return build_score(self._spec), (), arguments, (scores, 0)
        if name == SET_ROW:
            vocab_size = self._rows.bias.shape[1:]
            mask = jax.ShapeDtypeStruct(vocab_size, np.bool_)
            bias = jax.ShapeDtypeStruct(vocab_size, np.float32)
            arguments = (self._rows, _i32(), _i32(*vocab_size), mask, bias)
            return set_row, ("rows",), arguments, self._rows
        if name == SET_PAGES:
            tables = self._rows.page_tables
            arguments = (self._rows, _i32(), _i32(len(tables), tables[0].shape[1]))
            return set_pages, ("rows",), arguments, self._rows
        layout = self._layouts[name]
        output = StepOutput(0, scores, 0, 0)  # type: ignore[arg-type]
        arguments = (self._leaves, self._kv, self._rows, _i32(layout.size))
        step = build_step(self._spec, layout)
        return step, ("kv", "rows"), arguments, (self._kv, self._rows, output)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32)


def _size_of_name(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split("x")))
