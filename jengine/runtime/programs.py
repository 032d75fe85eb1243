"""The executables of one runner: a step for each bucket, `score`, `set_row` and the empty state.
Compiled ahead, kept on disk.
"""

import dataclasses
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from jengine.layers.sampling import Logprobs, RowState
from jengine.pallas_kernels.platform import tracing_invariant
from jengine.runtime.aot import ExecutableStore
from jengine.runtime.batch import BatchLayout
from jengine.runtime.buckets import Bucket
from jengine.runtime.compile_queue import CompileQueue
from jengine.runtime.expert_slots import ExpertLayer, move_experts
from jengine.runtime.memory import ExecutableMemory, executable_memory
from jengine.runtime.step import (
    KV,
    StepOutput,
    StepSpec,
    build_score,
    build_step,
    set_pages,
    set_row,
)
from jengine.runtime.xla_options import Options, bucket_options
from jengine.sharding.placement import Placement

log = logging.getLogger(__name__)

SCORE_ROWS = 64  # prompt positions scored by one call
SCORE, SET_ROW, SET_PAGES, EMPTY = "score", "set_row", "set_pages", "empty_state"
MOVE_EXPERTS = "move_experts"
# While we serve: tracing takes the interpreter lock, and tuning takes the GPU and some of its
# memory (`memory.reserve_bytes`).
BACKGROUND_THREADS = 2


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled under one name."""

    function: Callable[..., Any]
    donated: Sequence[str]
    arguments: tuple[Any, ...]  # abstract
    result: Any  # a tree shaped like the result
    input_bytes: int  # of arguments that come from the host at each call

    @property
    def structure(self) -> tuple[Any, Any]:
        return jax.tree.structure((self.arguments, {})), jax.tree.structure(self.result)


@dataclasses.dataclass(frozen=True)
class ProgramTable:
    """Every program of a runner by name. Pure: nothing is compiled, no array is held."""

    spec: StepSpec
    layouts: Mapping[Bucket, BatchLayout]
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    kv: tuple[jax.ShapeDtypeStruct, ...]
    rows: RowState  # of ShapeDtypeStruct
    hidden: jax.ShapeDtypeStruct  # one row [D] of final hidden states
    fill: float  # of fresh pages
    placement: Placement
    expert_layers: tuple[ExpertLayer, ...] = ()  # whose experts lie in slots

    def lower(self, name: str) -> jax.stages.Lowered:
        with tracing_invariant(self.spec.batch_invariant):
            return self._lower(name)

    def _lower(self, name: str) -> jax.stages.Lowered:
        program = self.program(name)
        if name == EMPTY:  # no argument says where it lives
            where = jax.tree.map(lambda x: x.sharding, program.result)
            return jax.jit(program.function, out_shardings=where).lower()
        on_ranks = self.placement.on_ranks(program.function, program.arguments, program.result)
        return jax.jit(on_ranks, donate_argnames=program.donated).lower(*program.arguments)

    def options(self, name: str, options: Options) -> Options:
        """What to compile it with, where most programs are compiled with `options`."""
        if (layout := self.layouts_by_name.get(name)) is None:
            return options
        is_invariant = self.spec.batch_invariant
        return bucket_options(options, layout.num_tokens, layout.num_seqs, is_invariant)

    def program(self, name: str) -> Program:
        if name == EMPTY:
            return Program(self._empty_state, (), (), (self.kv, self.rows), 0)
        if name == SCORE:
            return self._score()
        if name == SET_ROW:
            return self._set_row()
        if name == SET_PAGES:
            return self._set_pages()
        if name == MOVE_EXPERTS:
            return self._move_experts()
        return self._step(name)

    def _step(self, name: str) -> Program:
        layout = self.layouts_by_name[name]
        logits = 0 if self.spec.keeps_logits else None
        output = StepOutput(0, _SCORES, logits, 0)  # type: ignore[arg-type]
        packed, masks = self._per_data_rank(layout.size), self._per_data_rank(*layout.mask_shape)
        arguments = (self.leaves, self.kv, self.rows, packed, masks)
        step = build_step(self.spec, layout)
        result = (self.kv, self.rows, output)
        input_bytes = 4 * (layout.size + math.prod(layout.mask_shape))
        return Program(step, ("kv", "rows"), arguments, result, input_bytes)

    def _score(self) -> Program:
        hidden = self._input(self.hidden.dtype, SCORE_ROWS, *self.hidden.shape)
        arguments = (self.leaves, hidden, self._i32(SCORE_ROWS))
        return Program(build_score(self.spec), (), arguments, (_SCORES, 0), 4 * SCORE_ROWS)

    def _set_row(self) -> Program:
        vocab_size = self.rows.bias.shape[1:]
        mask = self._input(np.bool_, *vocab_size)
        bias = self._input(np.float32, *vocab_size)
        arguments = (self.rows, self._i32(), self._i32(*vocab_size), mask, bias)
        return Program(set_row, ("rows",), arguments, self.rows, 9 * vocab_size[0])

    def _set_pages(self) -> Program:
        tables = self.rows.page_tables
        num_pages = len(tables), tables[0].shape[1]
        arguments = (self.rows, self._i32(), self._i32(*num_pages))
        return Program(set_pages, ("rows",), arguments, self.rows, 4 * math.prod(num_pages))

    def _move_experts(self) -> Program:
        layer = self.expert_layers[0]  # all have the same shapes
        weights, table = tuple(self.leaves[i] for i in layer.weights), self.leaves[layer.table]
        num_ranks = self.placement.split.ways("experts")
        moves = num_ranks, weights[0].shape[0] // num_ranks
        arguments = (weights, self._i32(*moves), self._i32(*moves), self._i32(), table)
        input_bytes = 4 * (2 * math.prod(moves) + 1 + math.prod(table.shape))
        # Steps in flight still read the weights, and a moved expert is read after its slot is
        # written: nothing is donated.
        return Program(move_experts, (), arguments, (weights, table), input_bytes)

    def _empty_state(self) -> tuple[KV, RowState]:
        kv = tuple(jnp.full(x.shape, self.fill, x.dtype) for x in self.kv)
        return kv, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.rows)

    def _i32(self, *shape: int) -> jax.ShapeDtypeStruct:
        return self._input(np.int32, *shape)

    def _input(self, dtype: DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
        """What comes from the host at each call, the same for all ranks. On one device, where it
        lives is left to JAX.
        """
        sharding = None if self.placement.is_one_device else self.placement.replicated
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    def _per_data_rank(self, *shape: int) -> jax.ShapeDtypeStruct:
        """The same, for each data rank its own."""
        if self.placement.is_one_device:
            return self._i32(*shape)
        shape = (self.placement.split.data * shape[0], *shape[1:])
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.placement.per_data_rank)

    @functools.cached_property
    def layouts_by_name(self) -> dict[str, BatchLayout]:
        return {str(bucket): layout for bucket, layout in self.layouts.items()}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """How an executable came to be."""

    name: str
    seconds: float
    was_compiled: bool  # or loaded
    num_bytes: int  # on disk


class Programs:
    """Name -> executable: `load`, `compile`, `compile_rest`. After that a compilation that nobody
    prepared is a fault: it is counted and logged.
    """

    def __init__(
        self, table: ProgramTable, names: Sequence[str], store: ExecutableStore, options: Options
    ) -> None:
        """`names`, all of the table, in the order to compile them."""
        self.names = tuple(names)
        self._table = table
        self._store = store
        self._options = options
        self._ready: dict[str, jax.stages.Compiled] = {}
        self._trace_lock = threading.Lock()
        self._lock = threading.Lock()
        self._queue = CompileQueue(self._compile)
        self._is_warm = False
        self._started: float | None = None  # when `load` was called
        # Steps are chosen from these; before `load` from all, compiled as they are needed.
        self.usable_buckets: tuple[Bucket, ...] = tuple(sorted(table.layouts))
        self.prepared: dict[str, Prepared] = {}
        self.warm_up_seconds = 0.0  # of `load` and `compile`
        self.num_late = 0

    def load(self, threads: int) -> None:
        """Load what is on disk."""
        self._started = time.perf_counter()
        self.usable_buckets = ()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self._load, self.names))
        self.warm_up_seconds = time.perf_counter() - self._started

    def compile(self, num_names: int, threads: int) -> None:
        """Compile what is missing of the first so many names, and wait for it."""
        started = time.perf_counter()
        missing = self._missing(self.names[:num_names])
        self._queue.start(missing, threads)
        for name in tqdm(missing, "executables", leave=False, disable=None):
            self._queue.wait((name,))
        self._is_warm = True
        self.warm_up_seconds += time.perf_counter() - started
        log.info(
            "%d of %d executables ready in %.1f s (%d compiled)%s",
            len(self._ready),
            len(self.names),
            self.warm_up_seconds,
            self.num_compiled,
            ", serving" if len(self._ready) < len(self.names) else "",
        )

    def compile_rest(self) -> None:
        """Go on in threads of our own, if anything is missing still."""
        if missing := self._missing(self.names):
            self._queue.start(missing, BACKGROUND_THREADS)
            self._queue.when_done(self._report_complete)

    def _missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self._ready]

    def __getitem__(self, name: str) -> jax.stages.Compiled:
        if (compiled := self._ready.get(name)) is not None:
            return compiled
        if self._queue.is_pending(name):
            log.info("waiting for %s to be compiled", name)
            self._queue.wait((name,))
        else:
            if self._is_warm:
                self.num_late += 1
                log.warning("compiling %s after warm-up", name)
            self._compile(name)
        return self._ready[name]

    @property
    def num_compiled(self) -> int:
        """Executables that were not found on disk."""
        return sum(prepared.was_compiled for prepared in list(self.prepared.values()))

    @property
    def num_pending(self) -> int:
        """Executables that are still being compiled while we serve."""
        return self._queue.num_pending

    @property
    def failures(self) -> dict[str, str]:
        """Programs that could not be compiled in the background, and why. Larger buckets serve."""
        return self._queue.failures()

    @property
    def ready(self) -> Mapping[str, jax.stages.Compiled]:
        return self._ready

    def when_compiled(self, callback: Callable[[], object]) -> None:
        """Call it when nothing is being compiled any more; perhaps at once, perhaps in another
        thread.
        """
        self._queue.when_done(callback)

    def memory(self) -> dict[str, ExecutableMemory]:
        """Of every executable that is ready."""
        return {
            name: executable_memory(compiled, self._table.program(name).input_bytes)
            for name, compiled in list(self._ready.items())
            if name != EMPTY  # runs once, and its outputs are the KV cache
        }

    def close(self) -> None:
        """Compile nothing more."""
        self._queue.close()

    def _load(self, name: str) -> None:
        started = time.perf_counter()
        structure = self._table.program(name).structure
        if (compiled := self._store.load(name, structure)) is not None:
            self._keep(name, compiled, started, was_compiled=False)

    def _compile(self, name: str) -> None:
        started = time.perf_counter()
        # Tracing holds the interpreter lock anyway; one trace at a time keeps its caches safe.
        with self._trace_lock:
            lowered = self._table.lower(name)
        options = self._table.options(name, self._options)
        compiled = lowered.compile(compiler_options=dict(options))
        self._store.save(name, compiled)
        self._keep(name, compiled, started, was_compiled=True)

    def _keep(
        self, name: str, compiled: jax.stages.Compiled, started: float, *, was_compiled: bool
    ) -> None:
        seconds = time.perf_counter() - started
        self.prepared[name] = Prepared(name, seconds, was_compiled, self._store.size(name))
        with self._lock:
            self._ready[name] = compiled
            if self._started is None:
                return
            buckets = self._table.layouts
            self.usable_buckets = tuple(sorted(b for b in buckets if str(b) in self._ready))

    def _report_complete(self) -> None:
        assert self._started is not None
        seconds = time.perf_counter() - self._started
        log.info("all %d executables ready after %.1f s", len(self._ready), seconds)


_SCORES = Logprobs(0, 0, 0, 0)  # type: ignore[arg-type]
