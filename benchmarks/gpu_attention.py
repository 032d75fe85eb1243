"""Ragged paged attention on a GPU: time beside the memory or arithmetic floor.

    python -m benchmarks.gpu_attention [--sweep]

A program runs the kernel over several layers' pages, so that nothing stays in the L2 cache between
two of them; its time is the kernel's own, from a profiler trace. The floors are measured here too:
a device copy (bytes read and written) and a bfloat16 matrix product. `--sweep` tries other tilings.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_profile import kernel_times
from jengine.pallas_kernels.ragged_paged_attention import triton_gpu
from jengine.pallas_kernels.ragged_paged_attention.triton_gpu import Tiling
from jengine.pallas_kernels.triton_call import Schedule

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
KERNELS = ("decode_chunk", "fold_chunks", "attend_tile")
REPEATS = 9
CALLS = 4  # behind each other: the host is ahead of the device
DECODES = (
    (1, 1088),  # prompts of 1,024 tokens and half of the answers of `gpu_table`
    (8, 1088),
    (32, 1088),
    (64, 1088),
    (128, 1088),
    (256, 576),
    (16, 32768),
    (1, 131072),
)
SWEPT = ((1, 1088), (64, 1088), (256, 576), (1, 8192))
PREFILLS = ((1, 128), (1, 1024), (1, 8192), (8, 1024), (4, 2048))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    copy, flops = measure_copy(), measure_matmul()
    print(
        f"{jax.devices()[0].device_kind}, JAX {jax.__version__}: copy {copy / 1e12:.2f} TB/s, "
        f"matmul {flops / 1e12:.0f} TFLOP/s"
    )
    print(f"{'decode':>14} {'us':>8} {'floor us':>9} {'share':>6}")
    for batch, context in DECODES:
        floor = batch * context * 2 * KV_HEADS * HEAD_DIM * 2 / copy * 1e6
        report(f"{batch} x {context}", time_attention([(1, context)] * batch, True), floor)
        if options.sweep and (batch, context) in SWEPT:
            sweep_decode([(1, context)] * batch, floor)
    print(f"{'prefill':>14} {'us':>8} {'floor us':>9} {'share':>6}")
    for batch, length in PREFILLS:
        floor = batch * 4 * HEADS * HEAD_DIM * (length * (length + 1) / 2) / flops * 1e6
        report(f"{batch} x {length}", time_attention([(length, length)] * batch, False), floor)
        if options.sweep and (batch, length) in SWEPT:
            sweep_prefill([(length, length)] * batch, floor)


def sweep_decode(lens: list[tuple[int, int]], floor: float) -> None:
    original = triton_gpu.decode_tiling
    for block, warps, stages, programs in (
        (64, 4, 3, 3), (64, 4, 5, 3), (64, 4, 5, 2), (128, 4, 3, 2), (128, 8, 3, 1), (128, 8, 3, 2),
        (128, 8, 3, 3), (32, 4, 7, 4), (128, 4, 5, 1), (64, 8, 5, 3),
    ):  # fmt: skip
        tiling = Tiling(16, block, Schedule(warps, stages), programs)
        triton_gpu.decode_tiling = lambda *_, t=tiling: t
        report(f"{block}/{warps}/{stages}/{programs}", time_attention(lens, True), floor)
    triton_gpu.decode_tiling = original


def sweep_prefill(lens: list[tuple[int, int]], floor: float) -> None:
    original = triton_gpu.tile_tiling
    for rows, block, warps, stages in (
        (256, 64, 8, 3), (256, 64, 8, 5), (256, 64, 16, 3), (256, 32, 8, 5), (128, 128, 8, 4),
        (128, 128, 8, 3),
    ):  # fmt: skip
        tiling = Tiling(rows, block, Schedule(warps, stages))
        triton_gpu.tile_tiling = lambda *_, t=tiling: t
        try:
            report(f"{rows}/{block}/{warps}/{stages}", time_attention(lens, False), floor)
        except Exception as error:  # a tiling that does not fit
            print(f"{rows}/{block}/{warps}/{stages}: {str(error)[:80]}")
    triton_gpu.tile_tiling = original


def report(name: str, us: float, floor: float) -> None:
    print(f"{name:>14} {us:>8.1f} {floor:>9.1f} {floor / us:>6.0%}", flush=True)


def time_attention(lens: list[tuple[int, int]], is_decode: bool) -> float:
    """Microseconds of one layer."""
    pages_per_seq = max(-(-kv // PAGE_SIZE) for _, kv in lens)
    num_pages = len(lens) * pages_per_seq + 1
    layers = max(4, min(16, int(400e6 / (num_pages * PAGE_SIZE * 4096))))
    key = jax.random.key(0)
    shape = (num_pages, PAGE_SIZE, 2, KV_HEADS, HEAD_DIM)
    kv = [jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16) for i in range(layers)]
    rng = np.random.default_rng(0)
    table = 1 + rng.permutation(num_pages - 1).astype(np.int32).reshape(len(lens), pages_per_seq)
    cu = np.concatenate([[0], np.cumsum([new for new, _ in lens])]).astype(np.int32)
    q = jax.random.normal(key, (int(cu[-1]), HEADS, HEAD_DIM), jnp.bfloat16)
    kv_lens = np.array([length for _, length in lens], np.int32)

    @jax.jit
    def run(q: jax.Array, kv: list[jax.Array], table: Any, cu: Any, kv_lens: Any) -> jax.Array:
        for pages in kv:
            q = triton_gpu.ragged_paged_attention(
                q, pages, table, cu, kv_lens, jnp.int32(len(lens)), scale=HEAD_DIM**-0.5,
                is_decode=is_decode,
            )  # fmt: skip
        return q

    call = partial(run, q, kv, table, cu, kv_lens)
    jax.block_until_ready(call())
    times = kernel_times(call, calls=3)
    kernels = [t for name, t in times.items() if name in KERNELS]
    return sum(t.total_us for t in kernels) / 3 / layers


def measure_copy() -> float:
    """Bytes a second, read and written."""
    x = jnp.ones((1 << 31,), jnp.bfloat16)
    return 2 * x.nbytes / median_seconds(partial(jax.jit(lambda x: x + 1), x))


def measure_matmul() -> float:
    x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    return 2 * 8192**3 / median_seconds(partial(jax.jit(lambda x: x @ x), x))


def median_seconds(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in itertools.repeat(None, REPEATS):
        started = time.perf_counter()
        jax.block_until_ready([run() for _ in range(CALLS)])
        seconds.append((time.perf_counter() - started) / CALLS)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
