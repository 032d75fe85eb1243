"""Products with packed weights at the width of DeepSeek-V4-Flash, beside the same in bfloat16, what
XLA makes of the plain-JAX references, and floors: tables `experts_fp4` and `linear_fp8` of
`python -m benchmarks.gpu_kernels`.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_kernels import BYTES_PER_US, FLOPS_PER_US, normal
from jengine.pallas_kernels.grouped_matmul import reference as experts_reference
from jengine.pallas_kernels.grouped_matmul import triton_gpu as experts_gpu
from jengine.pallas_kernels.linear import reference as linear_reference
from jengine.pallas_kernels.linear.api import linear
from jengine.pallas_kernels.linear_heads.api import linear_heads
from jengine.pallas_kernels.packed import FP8_BLOCKS, MXFP4, SCALE_BIAS, PackedWeight, Packing
from jengine.runtime.xla_options import compiler_options

TOKENS = (1, 8, 64, 1024, 8192)
FEW_TOKENS = 64
EXPERTS, TOP_K, EMBED, MLP = 256, 6, 4096, 2048
LINEAR = {  # (heads, outputs of each, depth)
    "wq_b": (1, 32768, 1024),
    "wo_a": (8, 1024, 4096),
    "wo_b": (1, 4096, 8192),
}
CACHE_BYTES = 200e6  # weights of a program's calls together: nothing stays in the L2 cache
MAX_US = 2e5  # of all rounds
THREADS = 8

Call = tuple[Any, ...]
Timed = dict[str, "Future[Callable[[], Any]]"]


def experts_fp4() -> None:
    packed = draw((EXPERTS, 2 * MLP, EMBED), MXFP4, 1), draw((EXPERTS, EMBED, MLP), MXFP4, 2)
    plain = tuple(
        jnp.tile(normal(seed, (1, *weight.shape[1:])), (EXPERTS, 1, 1))
        for seed, weight in enumerate(packed)
    )
    num_bytes = sum(w.codes.nbytes + w.scales.nbytes for w in packed) / EXPERTS

    def run(backend: Any, x: jax.Array, ids: jax.Array, weights: jax.Array, *experts: Any) -> Any:
        return backend.expert_parts(x, ids, weights, *experts, num_tokens=jnp.int32(len(x)))

    with ThreadPoolExecutor(THREADS) as pool:
        rows = []
        for tokens in TOKENS:
            calls, touched = choices(tokens, 6 if tokens <= FEW_TOKENS else 2)
            floor = max(
                touched * num_bytes / BYTES_PER_US, tokens * TOP_K * 6 * EMBED * MLP / FLOPS_PER_US
            )
            programs = {
                "ours": (experts_gpu, packed, calls),
                "ours in bfloat16": (experts_gpu, plain, calls),
                "XLA": (experts_reference, packed, calls[:1]),
            }
            timed = {
                label: pool.submit(prepare, partial(run, backend), [(*c, *weights) for c in given])
                for label, (backend, weights, given) in programs.items()
            }
            rows.append((f"experts_fp4 x {tokens}", floor, timed))
        report(rows)


def choices(tokens: int, count: int) -> tuple[list[Call], float]:
    """So many calls, and how many experts one of them touches."""
    rng, calls, touched = np.random.default_rng(tokens), [], []
    weights = jnp.full((tokens, TOP_K), 1 / TOP_K, jnp.float32)
    for i in range(count):
        ids = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
        calls.append((normal(10 + i, (tokens, EMBED)), jnp.asarray(ids), weights))
        touched.append(len(np.unique(ids)))
    return calls, float(np.mean(touched))


def linear_fp8() -> None:
    for name, (heads, outputs, depth) in LINEAR.items():
        shape = (outputs, depth) if heads == 1 else (heads, outputs, depth)
        copies = -(-int(CACHE_BYTES) // (heads * outputs * depth))
        packed = [draw(shape, FP8_BLOCKS, i) for i in range(copies)]
        plain = [normal(i, shape) for i in range(copies)]
        num_bytes = packed[0].codes.nbytes + packed[0].scales.nbytes
        with ThreadPoolExecutor(THREADS) as pool:
            rows = []
            for tokens in TOKENS:
                inputs = (tokens, depth) if heads == 1 else (tokens, heads, depth)
                xs = [normal(50 + i, inputs) for i in range(copies)]
                timed = {
                    label: pool.submit(prepare, run, list(zip(xs, weights, strict=True)))
                    for label, run, weights in (
                        ("ours", product, packed),
                        ("ours in bfloat16", product, plain),
                        ("XLA", plain_product, packed),
                    )
                }
                flops = 2 * tokens * heads * outputs * depth
                floor = max(num_bytes / BYTES_PER_US, flops / FLOPS_PER_US)
                rows.append((f"linear_fp8 {name} x {tokens}", floor, timed))
            report(rows)


def product(x: jax.Array, weight: Any) -> jax.Array:
    num_tokens = jnp.int32(len(x))
    if x.ndim == 2:
        return linear(x, weight, num_tokens=num_tokens)
    return linear_heads(x, weight, num_tokens=num_tokens)


def plain_product(x: jax.Array, weight: PackedWeight) -> jax.Array:
    unpacked = weight.unpacked(x.dtype)
    if x.ndim == 2:
        return linear_reference.linear(x, unpacked)
    return jnp.einsum("TNH,NFH->TNF", x, unpacked, preferred_element_type=x.dtype)


def draw(shape: tuple[int, ...], packing: Packing, seed: int) -> PackedWeight:
    *rows, depth = shape
    key = jax.random.key(seed)
    codes = jax.random.bits(key, (*rows, packing.num_bytes(depth)), jnp.uint8)
    if packing.codes == "e4m3":
        codes = codes & 0x9F | 0x20  # of moderate size
    scales = jnp.full((*rows, packing.num_groups(depth)), SCALE_BIAS - 7, jnp.uint8)
    return PackedWeight(codes, scales, packing)


def prepare(run: Callable[..., Any], calls: Sequence[Call]) -> Callable[[], Any]:
    """The compiled program of all calls, on them."""
    program = jax.jit(lambda calls: [run(*call) for call in calls]).lower(list(calls))
    compiled = program.compile(compiler_options=dict(compiler_options("cuda")))
    return lambda: (compiled(list(calls)), len(calls))


def report(rows: Sequence[tuple[str, float, Timed]]) -> None:
    """Once all are compiled: XLA tunes on the device that is timed."""
    wait(future for _, _, timed in rows for future in timed.values())
    for name, floor, timed in rows:
        line = f"{name}: floor {floor:.1f} us"
        for label, future in timed.items():
            try:
                line += f", {label} {microseconds(future.result()):.1f}"
            except Exception as error:  # whatever it is, the other figures are worth having
                traceback.print_exc()
                line += f", {label} failed ({type(error).__name__})"
        print(line, flush=True)


def microseconds(program: Callable[[], Any]) -> float:
    """Of one of the calls: the best of some rounds."""
    best, spent = np.inf, 0.0
    jax.block_until_ready(program()[0])
    for _ in range(12):
        started = time.perf_counter()
        runs = [program() for _ in range(4 if spent else 1)]
        jax.block_until_ready(runs)
        elapsed = (time.perf_counter() - started) * 1e6
        best = min(best, elapsed / len(runs) / runs[0][1])
        spent += elapsed
        if spent > MAX_US:
            break
    return float(best)
