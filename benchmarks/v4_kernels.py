"""DeepSeek-V4's own operations at the width of Flash on a GPU, beside their floors and what XLA
makes of their plain-JAX references: `python -m benchmarks.gpu_kernels v4`.

Page tables are those of an engine of 131,072 tokens whatever the context, so that one program times
all contexts. Each line is the mean of calls with page tables of their own into one large cache.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_kernels import BYTES_PER_US, FLOPS_PER_US, normal
from jengine.pallas_kernels.joint_attention import reference as joint_reference
from jengine.pallas_kernels.joint_attention import triton_gpu as joint_gpu
from jengine.pallas_kernels.select_tokens import reference as select_reference
from jengine.pallas_kernels.select_tokens import triton_gpu as select_gpu
from jengine.runtime.xla_options import compiler_options

MAX_LEN, PAGE, WINDOW = 131072, 128, 128
HEADS, DIM = 64, 512
INDEX_HEADS, INDEX_DIM, TOP_K = 64, 128, 512
NUM_PAGES = 64 * MAX_LEN // PAGE
BATCHES, CONTEXTS = (1, 8, 32, 64), (4096, 8192, 131072)
PREFILL, PREFILL_CONTEXT = 2048, 8192
FEW, CALLS = 8, (16, 6)  # calls in a program: of so few sequences, of more
WITH_REFERENCE = 8  # sequences; the reference of others would only take longer

Program = Callable[[Any], Any]


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


def v4() -> None:
    for table in (selection, attention):
        try:
            table()
        except Exception:  # the other tables are worth having all the same
            traceback.print_exc()


def attention() -> None:
    """A layer that reads selected entries of 4 tokens, and one that reads all of 128."""
    window = normal(1, (1024, PAGE, DIM))
    sinks = jnp.zeros((HEADS,), jnp.float32)
    for ratio, width, row in ((4, TOP_K, DIM + INDEX_DIM), (128, MAX_LEN // 128, DIM)):
        pages = normal(2, (NUM_PAGES, PAGE // ratio, row))

        def ours(*args: Any) -> jax.Array:
            return joint(joint_gpu, *args)

        def plain(*args: Any) -> jax.Array:
            return joint(joint_reference, *args)

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
            report(f"attention, entries of {ratio}, {name}", ours, plain, calls, positions, floors)


def joint(
    backend: Any, q: Any, window: Any, pages: Any, sinks: Any, near: Any, far: Any
) -> jax.Array:
    caches = [(window, near), (pages, far)]
    return backend.joint_attention(q, caches, sinks, jnp.int32(len(q)), scale=DIM**-0.5)


def selection() -> None:
    pages = normal(2, (NUM_PAGES, PAGE // 4, DIM + INDEX_DIM))

    def ours(*args: Any) -> jax.Array:
        return select(select_gpu, *args)

    def plain(*args: Any) -> jax.Array:
        return select(select_reference, *args)

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
        report(f"selection, {name}", ours, plain, calls, positions, floors)


def select(
    backend: Any, q: Any, weights: Any, pages: Any, table: Any, cu: Any, lens: Any
) -> jax.Array:
    return backend.select_tokens(
        q, weights, pages, table, cu, lens, jnp.int32(len(lens)),
        top_k=TOP_K, scale=INDEX_DIM**-0.5, tokens_per_entry=4,
    )  # fmt: skip


def steps() -> Iterator[tuple[str, list[np.ndarray]]]:
    """(name, positions of the tokens at each context) of what is timed."""
    for batch in BATCHES:
        yield f"{batch} sequences", [np.full(batch, context - 1) for context in CONTEXTS]
    yield f"a chunk of {PREFILL}", [np.arange(PREFILL_CONTEXT - PREFILL, PREFILL_CONTEXT)]


def calls_of(tokens: int) -> int:
    """Enough to keep the host ahead of the device."""
    return 1 if tokens == PREFILL else CALLS[tokens > FEW]


def report(
    name: str,
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    calls: Sequence[list[tuple[Any, ...]]],
    positions: Sequence[np.ndarray],
    floors: Sequence[float],
) -> None:
    """A line for each context, of programs that are compiled once."""
    tokens = len(positions[0])
    try:
        program = compiled(ours, calls[0])
        other = compiled(plain, calls[0][:1]) if tokens in (WITH_REFERENCE, PREFILL) else None
        for at, of_context, floor in zip(positions, calls, floors, strict=True):
            us = time_program(program, of_context, 20)
            line = f"{name} at {at[-1] + 1}: floor {floor:.1f} us, ours {us:.1f}"
            if other is not None:
                line += f", XLA {time_program(other, of_context[:1], 1):.0f}"
            print(line, flush=True)
    except Exception:  # the other lines are worth having all the same
        print(f"{name}: failed", flush=True)
        traceback.print_exc()


def compiled(run: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Program:
    program = jax.jit(lambda calls: [run(*call) for call in calls]).lower(calls)
    return program.compile(compiler_options=compiler_options("cuda"))


def time_program(program: Program, calls: list[tuple[Any, ...]], rounds: int) -> float:
    """Microseconds of one of the calls: the best of some rounds, after one that does not count."""
    jax.block_until_ready(program(calls))
    best = float("inf")
    for _ in range(3 if rounds > 1 else 1):
        started = time.perf_counter()
        jax.block_until_ready([program(calls) for _ in range(rounds)])
        best = min(best, (time.perf_counter() - started) / rounds)
    return best / len(calls) * 1e6
