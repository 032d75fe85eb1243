"""Times the CPU kernels at the shapes of SmolLM2-135M: `python benchmarks/cpu_kernels.py
{linear,step} [...]`.

`linear` compares the C++ kernel with XLA's dot, shape by shape. `step` runs a skeleton of a whole
model step (no sampling beyond arg max, random weights) and says where its time goes, by leaving
parts out. Milliseconds. The sides of a comparison alternate, so that a noisy neighbour hits all;
besides the median stand the best time and the CPU time of all threads, which neighbours disturb
less.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jengine.pallas_kernels import native
from jengine.pallas_kernels.argmax_rows import argmax_rows
from jengine.pallas_kernels.kv_write import kv_write
from jengine.pallas_kernels.linear import cpu_ffi, linear
from jengine.pallas_kernels.linear import reference as linear_reference
from jengine.pallas_kernels.ragged_paged_attention import ragged_paged_attention
from jengine.pallas_kernels.rms_norm import rms_norm
from jengine.pallas_kernels.silu_mul import silu_mul

EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, LAYERS, PAGE = 576, 9, 3, 64, 1536, 49152, 30, 16
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
SHAPES = {
    "qkv": (QKV, EMBED),
    "o": (EMBED, EMBED),
    "gate_up": (2 * MLP, EMBED),
    "down": (EMBED, MLP),
    "head": (VOCAB, EMBED),
}
ROWS = (1, 2, 4, 8, 32, 64, 128, 512)
COLD_BYTES = 120e6  # more than any cache: a decode step reads each weight once


@dataclass(frozen=True)
class Workload:
    """One step: `num_seqs` sequences of `q_len` new tokens each, ending at `kv_len`."""

    name: str
    num_seqs: int
    q_len: int
    kv_len: int

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.q_len


WORKLOADS = (
    Workload("decode 1", 1, 1, 128),
    Workload("decode 8", 8, 1, 128),
    Workload("decode 32", 32, 1, 128),
    Workload("prefill 512", 1, 512, 512),
)
PARTS = ("linear", "head", "kv_write", "attention", "rope", "norm", "silu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("linear", "step"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--only", default="", help="step: the workloads whose name holds this")
    parser.add_argument(
        "--split", action="store_true", help="step: time it without each part in turn"
    )
    args = parser.parse_args()
    print(f"jax {jax.__version__}", native.describe())
    if args.what == "linear":
        bench_linear(args.repeats, jnp.dtype(args.dtype))
    else:
        bench_step(args.repeats, jnp.dtype(args.dtype), args.only, args.split)


def bench_linear(repeats: int, dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    print("   shape  rows   C++ ms   XLA ms  ratio | best: C++    XLA ratio   GB/s   GF/s")
    for name, (outputs, depth) in SHAPES.items():
        count = int(np.clip(COLD_BYTES / (outputs * depth * dtype.itemsize), 1, 40))
        weights = [jnp.asarray(rng.standard_normal((outputs, depth)), dtype) for _ in range(count)]
        for rows in ROWS:
            x = jnp.asarray(rng.standard_normal((rows, depth)), dtype)
            calls = [
                jax.jit(partial(f, out_dtype=dtype))
                for f in (cpu_ffi.linear, linear_reference.linear)
            ]
            own, xla = measure(
                [partial(_each, call, x, weights) for call in calls], max(3, repeats // 4)
            )
            ms = own.best / count
            gigabytes = outputs * depth * dtype.itemsize / ms / 1e6
            gigaflops = 2 * rows * outputs * depth / ms / 1e6
            print(
                f"{name:>8} {rows:>5} {own.median / count:8.3f} {xla.median / count:8.3f} "
                f"{xla.median / own.median:6.2f} | {ms:9.3f} {xla.best / count:6.3f} "
                f"{xla.best / own.best:5.2f} {gigabytes:6.1f} {gigaflops:6.0f}"
            )


def _each(
    call: Callable[..., jax.Array], x: jax.Array, weights: Sequence[jax.Array]
) -> list[jax.Array]:
    return [call(x, w) for w in weights]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    best: float
    cpu: float  # median over calls of the process's CPU time, all threads


def measure(calls: Sequence[Callable[[], object]], repeats: int) -> list[Timing]:
    """Time the calls, one of each in turn."""
    times: list[list[tuple[float, float]]] = [[] for _ in calls]
    for call in calls:
        jax.block_until_ready(call())
    for _ in range(repeats):
        for call, mine in zip(calls, times, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            mine.append(((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3))
    return [
        Timing(float(np.median(wall)), min(wall), float(np.median(cpu)))
        for wall, cpu in (zip(*mine, strict=True) for mine in times)
    ]


def bench_step(repeats: int, dtype: jnp.dtype, only: str, split: bool) -> None:
    params, num_bytes = build_params(dtype)
    print(f"weights {num_bytes / 1e6:.0f} MB")
    for work in (work for work in WORKLOADS if only in work.name):
        variants: list[frozenset[str]] = [frozenset()]
        variants += [frozenset({part}) for part in PARTS] if split else []
        calls = []
        for skip in variants:
            start = time.perf_counter()
            calls.append(Step(work, params, dtype, skip))
            if not skip:
                seconds = time.perf_counter() - start
                print(f"{work.name}: {seconds:.1f} s to compile, {calls[0].lower_s:.1f} s tracing")
        whole, *without = measure(calls, repeats)
        print(
            f"{work.name}: median {whole.median:.2f} ms, {work.num_tokens / whole.median * 1e3:.0f}"
            f" tok/s; best {whole.best:.2f} ms, {work.num_tokens / whole.best * 1e3:.0f} tok/s,"
            f" weights at {num_bytes / whole.best / 1e6:.1f} GB/s; CPU {whole.cpu:.2f} ms"
        )
        for skip, part in zip(variants[1:], without, strict=True):
            wall, cpu = whole.best - part.best, whole.cpu - part.cpu
            print(f"{next(iter(skip)):>14}: best {wall:7.2f} ms, CPU {cpu:7.2f} ms")


def build_params(dtype: jnp.dtype) -> tuple[dict[str, Any], int]:
    rng = np.random.default_rng(0)

    def make(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(0.02 * rng.standard_normal(shape, np.float32), dtype)

    layers = [
        {name: make(SHAPES[name]) for name in ("qkv", "o", "gate_up", "down")}
        for _ in range(LAYERS)
    ]
    params = {"layers": layers, "embed": make((VOCAB, EMBED))}
    return params, sum(x.nbytes for x in jax.tree.leaves(params))


class Step:
    """A compiled step on its own KV pages, callable again and again."""

    def __init__(
        self, work: Workload, params: dict, dtype: jnp.dtype, skip: frozenset[str]
    ) -> None:
        pages_per_seq = -(-work.kv_len // PAGE)
        shape = (1 + work.num_seqs * pages_per_seq, PAGE, 2, KV_HEADS, HEAD_DIM)
        table = 1 + np.arange(work.num_seqs * pages_per_seq, dtype=np.int32).reshape(
            work.num_seqs, -1
        )
        positions = np.tile(
            np.arange(work.kv_len - work.q_len, work.kv_len, dtype=np.int32), work.num_seqs
        )
        sequence = np.repeat(np.arange(work.num_seqs), work.q_len)
        self.batch = jax.tree.map(
            jnp.asarray,
            {
                "tokens": np.arange(work.num_tokens, dtype=np.int32),
                "positions": positions,
                "slots": table[sequence, positions // PAGE] * PAGE + positions % PAGE,
                "table": table,
                "cu": np.arange(work.num_seqs + 1, dtype=np.int32) * work.q_len,
                "kv_lens": np.full(work.num_seqs, work.kv_len, np.int32),
                "num_seqs": np.int32(work.num_seqs),
                "num_tokens": np.int32(work.num_tokens),
            },
        )
        self.params = params
        self.kv = [jnp.zeros(shape, dtype) for _ in range(LAYERS)]
        start = time.perf_counter()
        lowered = jax.jit(partial(model_step, skip=skip), donate_argnames=("kv",)).lower(
            params, kv=self.kv, batch=self.batch
        )
        self.lower_s = time.perf_counter() - start
        self.compiled = lowered.compile()

    def __call__(self) -> jax.Array:
        self.kv, ids = self.compiled(self.params, kv=self.kv, batch=self.batch)
        return ids


def model_step(
    params: dict, kv: list[jax.Array], batch: dict, *, skip: frozenset[str]
) -> tuple[list, jax.Array]:
    """A Llama step without biases; `skip` names parts to leave out, for timing only."""
    x = params["embed"][batch["tokens"]]
    T = x.shape[0]
    dense = partial(linear, num_tokens=batch["num_tokens"])
    if "linear" in skip:
        dense = lambda x, w: jnp.broadcast_to(x[:, :1], (T, w.shape[0]))  # noqa: E731
    weight = jnp.ones((EMBED,), params["embed"].dtype)
    norm = partial(rms_norm, weight_D=weight, eps=1e-5, num_tokens=batch["num_tokens"])
    if "norm" in skip:
        norm = lambda x: x  # noqa: E731
    cos, sin = rope_table(batch["positions"])
    new_kv = []
    for layer, pages in zip(params["layers"], kv, strict=True):
        qkv = dense(norm(x), layer["qkv"]).reshape(T, -1, HEAD_DIM)
        q, k, v = jnp.split(qkv, (HEADS, HEADS + KV_HEADS), axis=1)
        if "rope" not in skip:
            q, k = rope(q, cos, sin), rope(k, cos, sin)
        if "kv_write" not in skip:
            pages = kv_write(pages, k, v, batch["slots"], batch["num_tokens"])
        new_kv.append(pages)
        if "attention" not in skip:
            lens = (batch["table"], batch["cu"], batch["kv_lens"], batch["num_seqs"])
            q = ragged_paged_attention(q, pages, *lens, scale=HEAD_DIM**-0.5)
        x = x + dense(q.reshape(T, EMBED), layer["o"])
        gate_up = dense(norm(x), layer["gate_up"])
        if "silu" in skip:
            hidden = gate_up[:, :MLP]
        else:
            hidden = silu_mul(gate_up, num_tokens=batch["num_tokens"])
        x = x + dense(hidden, layer["down"])
    last = norm(x[batch["cu"][1:] - 1])
    if "head" in skip:
        return new_kv, last[:, 0].astype(jnp.int32)
    return new_kv, argmax_rows(linear(last, params["embed"], out_dtype=jnp.float32))


def rope_table(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = 1e5 ** -(np.arange(0, HEAD_DIM, 2, dtype=np.float32) / HEAD_DIM)
    angle = positions[:, None].astype(jnp.float32) * inverse
    # Without the barrier XLA computes cos and sin anew in every layer's fusion: 3 % of a prefill.
    return jax.lax.optimization_barrier((jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]))


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


if __name__ == "__main__":
    main()
