"""DeepSeek-V4's own operations at the width of Flash on a GPU, beside their floors and what XLA
makes of their plain-JAX references: `python -m benchmarks.gpu_kernels v4`.

Page tables are those of an engine of 131,072 tokens whatever the context, so that one program times
all contexts. Each line is the mean of calls with page tables of their own into one large cache.
"""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_kernels import BYTES_PER_US, FLOPS_PER_US, normal
from jengine.pallas_kernels.compress_tokens import cut_into_pieces, state_size
from jengine.pallas_kernels.compress_tokens import reference as compress_reference
from jengine.pallas_kernels.compress_tokens import triton_gpu as compress_gpu
from jengine.pallas_kernels.grouped_matmul import reference as experts_reference
from jengine.pallas_kernels.grouped_matmul import triton_gpu as experts_gpu
from jengine.pallas_kernels.grouped_matmul.activation import ClampedSwiGLU
from jengine.pallas_kernels.joint_attention import reference as joint_reference
from jengine.pallas_kernels.joint_attention import triton_gpu as joint_gpu
from jengine.pallas_kernels.read_streams import reference as streams_reference
from jengine.pallas_kernels.read_streams import triton_gpu as streams_gpu
from jengine.pallas_kernels.route_experts import reference as route_reference
from jengine.pallas_kernels.route_experts import triton_gpu as route_gpu
from jengine.pallas_kernels.route_experts.grouped import GroupedRouting
from jengine.pallas_kernels.select_tokens import reference as select_reference
from jengine.pallas_kernels.select_tokens import triton_gpu as select_gpu
from jengine.runtime.xla_options import compiler_options

MAX_LEN, PAGE, WINDOW = 131072, 128, 128
EMBED, HEADS, DIM = 4096, 64, 512
INDEX_HEADS, INDEX_DIM, TOP_K = 64, 128, 512
NUM_PAGES = 64 * MAX_LEN // PAGE
BATCHES, CONTEXTS = (1, 8, 32, 64), (4096, 8192, 131072)
PREFILL, PREFILL_CONTEXT = 2048, 8192
FEW, CALLS = 8, (16, 6)  # calls in a program: of so few sequences, of more
WITH_REFERENCE = 8  # sequences, beside which the reference is timed
NUM_COMPILERS = 8

Calls = list[tuple[Any, ...]]
Program = Callable[[Calls], Any]


class Steps:
    """Slots and page tables of random steps."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def tables(self, seqs: int) -> np.ndarray:
        """[S, M]: pages of an infinite cache would all differ; here most do."""
        return self.rng.integers(NUM_PAGES, size=(seqs, MAX_LEN // PAGE)).astype(np.int32)

    def window_slots(self, tokens: int) -> np.ndarray:
        """Of a chunk's tokens, neighbours' overlap."""
        first = self.rng.integers(1024, size=tokens) * PAGE
        if tokens == PREFILL:
            first = np.arange(tokens)
        return (first[:, None] + np.arange(WINDOW)).astype(np.int32)

    def entry_slots(self, positions: np.ndarray, ratio: int, width: int) -> np.ndarray:
        """[T, width]: so many random entries of those that there are, or all; then -1."""
        tables = self.tables(1 if len(positions) == PREFILL else len(positions))
        tables = np.broadcast_to(tables, (len(positions), tables.shape[1]))
        slots = np.full((len(positions), width), -1, np.int32)
        for t, position in enumerate(positions):
            count = (position + 1) // ratio
            at = np.arange(count)
            if count > width:
                at = np.sort(self.rng.permutation(count)[:width])
            page = PAGE // ratio
            slots[t, : len(at)] = tables[t, at // page] * page + at % page
        return slots


@dataclass(frozen=True, slots=True)
class Row:
    """What is compiled once and timed at one or more contexts: a line for each."""

    name: str
    ours: Program
    plain: Program
    calls: Sequence[Calls]  # at each context
    positions: Sequence[np.ndarray]
    floors: Sequence[float]  # us

    @property
    def has_plain(self) -> bool:
        """The reference of others would only take longer."""
        return len(self.positions[0]) in (WITH_REFERENCE, PREFILL)


def v4(tables: Sequence[Callable[[], Iterator[Row]]]) -> None:
    with ThreadPoolExecutor(NUM_COMPILERS) as pool:
        for table in tables:
            with reported(repr(table)):
                jobs = []
                for row in table():
                    with reported(row.name):
                        # Traced one after the other, compiled at the same time.
                        ours = pool.submit(compiled, lowered(row.ours, row.calls[0]))
                        plain = None
                        if row.has_plain:
                            plain = pool.submit(compiled, lowered(row.plain, row.calls[0][:1]))
                        jobs.append((row, ours, plain))
                for row, ours, plain in jobs:
                    with reported(row.name):
                        report(row, ours.result(), None if plain is None else plain.result())


@contextlib.contextmanager
def reported(name: str) -> Iterator[None]:
    """Whatever fails, the other lines are worth having."""
    try:
        yield
    except Exception:
        print(f"{name}: failed", flush=True)
        traceback.print_exc()


def report(row: Row, ours: Program, plain: Program | None) -> None:
    for at, calls, floor in zip(row.positions, row.calls, row.floors, strict=True):
        line = f"{row.name} at {at[-1] + 1}: floor {floor:.1f} us, ours "
        line += f"{time_program(ours, calls, 20):.1f}"
        if plain is not None:
            line += f", XLA {time_program(plain, calls[:1], 1):.0f}"
        print(line, flush=True)


def attention() -> Iterator[Row]:
    """A layer that reads selected entries of 4 tokens, and one that reads all of 128."""
    window = normal(1, (1024, PAGE, DIM))
    sinks = jnp.zeros((HEADS,), jnp.float32)
    for ratio, width, row in ((4, TOP_K, DIM + INDEX_DIM), (128, MAX_LEN // 128, DIM)):
        pages = normal(2, (NUM_PAGES, PAGE // ratio, row))

        for name, positions in steps():
            tokens, draw = len(positions[0]), Steps(3)
            num_calls = calls_of(tokens)
            calls = [
                [
                    (
                        normal(10 + i, (tokens, HEADS, DIM)), window, pages, sinks,
                        jnp.asarray(draw.window_slots(tokens)),
                        jnp.asarray(draw.entry_slots(at, ratio, width)),
                    )
                    for i in range(num_calls)
                ]
                for at in positions
            ]  # fmt: skip
            entries = [
                sum(WINDOW + min((p + 1) // ratio, width) for p in at.tolist()) for at in positions
            ]
            floors = [
                max(n * DIM * 2 / BYTES_PER_US, n * HEADS * DIM * 4 / FLOPS_PER_US) for n in entries
            ]
            yield Row(
                f"attention, entries of {ratio}, {name}",
                partial(joint, joint_gpu),
                partial(joint, joint_reference),
                calls,
                positions,
                floors,
            )


def joint(backend: Any, calls: Calls) -> Any:
    return [
        backend.joint_attention(
            q, [(window, near), (pages, far)], sinks, jnp.int32(len(q)), scale=DIM**-0.5
        )
        for q, window, pages, sinks, near, far in calls
    ]


def selection() -> Iterator[Row]:
    pages = normal(2, (NUM_PAGES, PAGE // 4, DIM + INDEX_DIM))

    for name, positions in steps():
        tokens, draw = len(positions[0]), Steps(4)
        seqs = tokens if tokens < PREFILL else 1
        cu = jnp.asarray(np.arange(seqs + 1) * (tokens // seqs), jnp.int32)
        calls = [
            [
                (
                    normal(10 + i, (tokens, INDEX_HEADS, INDEX_DIM)),
                    normal(20 + i, (tokens, INDEX_HEADS)).astype(jnp.float32),
                    pages, jnp.asarray(draw.tables(seqs)), cu,
                    jnp.full((seqs,), int(at[-1]) + 1, jnp.int32),
                )
                for i in range(calls_of(tokens))
            ]
            for at in positions
        ]  # fmt: skip
        floors = []
        for at in positions:
            keys = at[-1] // 4 * seqs
            pairs = sum((p + 1) // 4 for p in at.tolist())
            floors.append(
                max(
                    keys * INDEX_DIM * 2 / BYTES_PER_US,
                    pairs * INDEX_HEADS * INDEX_DIM * 2 / FLOPS_PER_US,
                )
            )
        yield Row(
            f"selection, {name}",
            partial(select, select_gpu),
            partial(select, select_reference),
            calls,
            positions,
            floors,
        )


def select(backend: Any, calls: Calls) -> Any:
    return [
        backend.select_tokens(
            q, weights, pages, table, cu, lens, jnp.int32(len(lens)),
            top_k=TOP_K, scale=INDEX_DIM**-0.5, tokens_per_entry=4,
        )
        for q, weights, pages, table, cu, lens in calls
    ]  # fmt: skip


def compression() -> Iterator[Row]:
    for ratio, halves, channels in ((4, 2, DIM + INDEX_DIM), (128, 1, DIM)):
        ours, plain = (
            partial(compress, backend, ratio) for backend in (compress_gpu, compress_reference)
        )
        for name, positions in steps():
            tokens, at = len(positions[0]), positions[-1]
            seqs = tokens if tokens < PREFILL else 1
            states = jnp.zeros((2 * seqs, state_size(halves, channels)), jnp.float32)
            slots = jnp.asarray(np.stack([np.arange(seqs)] * 2), jnp.int32)
            cu = jnp.asarray(np.arange(seqs + 1) * (tokens // seqs), jnp.int32)
            calls = [
                (
                    *(
                        normal(10 * i + j, (tokens, halves, channels)).astype(jnp.float32)
                        for j in range(2)
                    ),
                    states, slots, cu, jnp.full((seqs,), int(at[-1]) + 1, jnp.int32),
                )
                for i in range(calls_of(tokens))
            ]  # fmt: skip
            moved = 2 * calls[0][0].nbytes + 2 * seqs * states.shape[1] * 4
            title = f"compression of {ratio}, {name}"
            yield Row(title, ours, plain, [calls], [at], [moved / BYTES_PER_US])


def compress(backend: Any, ratio: int, calls: Calls) -> Any:
    """One call after the other on the same states, as steps are."""
    states, entries = calls[0][2], []
    for values, scores, _, slots, cu, lens in calls:
        is_decode = len(values) == len(lens)
        pieces = cut_into_pieces(cu, lens, len(values), ratio, is_decode=is_decode)
        out, states = backend.compress_tokens(
            values, scores, states, slots, pieces, is_decode=is_decode
        )
        entries.append(out)
    return entries, states


def streams() -> Iterator[Row]:
    rows, width = 24, 4 * EMBED
    norm, base, scale = (jnp.ones(n, jnp.float32) for n in (EMBED, rows, 3))

    def run(backend: Any, calls: Calls) -> Any:
        return [
            backend.read_streams(
                x, fn, base, scale, norm, jnp.int32(len(x)),
                iterations=20, eps=1e-6, norm_eps=1e-6,
            )
            for x, fn in calls
        ]  # fmt: skip

    for name, positions in steps():
        at = positions[-1]
        calls = [
            (
                normal(10 + i, (len(at), 4, EMBED)),
                normal(30 + i, (rows, width)).astype(jnp.float32),
            )
            for i in range(calls_of(len(at)))
        ]
        floor = (calls[0][0].nbytes * 5 / 4 + calls[0][1].nbytes) / BYTES_PER_US
        yield Row(
            f"streams, {name}",
            partial(run, streams_gpu),
            partial(run, streams_reference),
            [calls],
            [at],
            [floor],
        )


def experts() -> Iterator[Row]:
    """The choice of 6 of 256 experts, and the experts, all of whose weights are alike."""
    E, k, F = 256, 6, 2048
    gate_up = jnp.tile(normal(1, (1, 2 * F, EMBED)), (E, 1, 1))
    down = jnp.tile(normal(2, (1, EMBED, F)), (E, 1, 1))
    bias = jnp.zeros((E,), jnp.float32)
    routing = GroupedRouting("sqrtsoftplus", scale=1.5, has_bias=True)
    activation = ClampedSwiGLU(1.0, 10.0, up_offset=0.0)

    def choose(backend: Any, calls: Calls) -> Any:
        return [
            backend.route_grouped(logits, bias, k, routing, renormalise=True)
            for _, logits, *_ in calls
        ]

    def multiply(backend: Any, calls: Calls) -> Any:
        out = []
        for x, logits, gate_up, down in calls:
            ids, weights = route_reference.route_grouped(logits, bias, k, routing, renormalise=True)
            out.append(
                backend.expert_parts(
                    x, ids, weights, gate_up, down, num_tokens=jnp.int32(len(x)),
                    activation=activation,
                )
            )  # fmt: skip
        return out

    for name, positions in steps():
        at = positions[-1]
        calls = [
            (
                normal(10 + i, (len(at), EMBED)),
                50 * normal(30 + i, (len(at), E)).astype(jnp.float32),
                gate_up, down,
            )
            for i in range(calls_of(len(at)))
        ]  # fmt: skip
        yield Row(
            f"routing, {name}",
            partial(choose, route_gpu),
            partial(choose, route_reference),
            [calls],
            [at],
            [calls[0][1].nbytes / BYTES_PER_US],
        )
        touched = E * (1 - (1 - k / E) ** len(at))
        floor = max(
            touched * 3 * F * EMBED * 2 / BYTES_PER_US, len(at) * k * 6 * F * EMBED / FLOPS_PER_US
        )
        yield Row(
            f"experts with XLA's routing, {name}",
            partial(multiply, experts_gpu),
            partial(multiply, experts_reference),
            [calls],
            [at],
            [floor],
        )


def steps() -> Iterator[tuple[str, list[np.ndarray]]]:
    """(name, positions of the tokens at each context) of what is timed."""
    for batch in BATCHES:
        yield f"{batch} sequences", [np.full(batch, context - 1) for context in CONTEXTS]
    yield f"a chunk of {PREFILL}", [np.arange(PREFILL_CONTEXT - PREFILL, PREFILL_CONTEXT)]


def calls_of(tokens: int) -> int:
    """Enough to keep the host ahead of the device."""
    return 1 if tokens == PREFILL else CALLS[tokens > FEW]


def lowered(run: Program, calls: Calls) -> jax.stages.Lowered:
    # A function object of its own: JAX keeps traces by it.
    return jax.jit(lambda calls: run(calls)).lower(calls)


def compiled(program: jax.stages.Lowered) -> Program:
    return program.compile(compiler_options=compiler_options("cuda"))


def time_program(program: Program, calls: Calls, rounds: int) -> float:
    """Microseconds of one of the calls: the best of some rounds, after one that does not count."""
    jax.block_until_ready(program(calls))
    best = float("inf")
    for _ in range(3 if rounds > 1 else 1):
        started = time.perf_counter()
        jax.block_until_ready([program(calls) for _ in range(rounds)])
        best = min(best, (time.perf_counter() - started) / rounds)
    return best / len(calls) * 1e6
