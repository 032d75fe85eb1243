"""Times one layer's routed experts against the number of experts touched: `python
benchmarks/moe_cpu.py`.

The tokens and the experts of each token stay as many; only how many different experts they share
changes. The floor is the touched weights read once, as fast as a plain pass over memory. Sizes take
turns, so that a noisy neighbour hits all. Milliseconds.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jengine.pallas_kernels import native
from jengine.pallas_kernels.grouped_matmul import expert_parts
from jengine.pallas_kernels.grouped_matmul.cases import Case


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--embed", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=768)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="also write everything as JSON here")
    args = parser.parse_args()
    shape = Case(1, args.top_k, args.experts, args.embed, args.mlp, args.dtype)
    bandwidth = bandwidth_in_place()
    print(f"{shape}\nC++ library: {native.is_available()}; memory {bandwidth / 1e9:.1f} GB/s")
    rows = [row for tokens in args.tokens for row in measure(shape, tokens, args.repeats)]
    print(f"{'tokens':>6} {'touched':>8} {'best':>8} {'median':>8} {'floor':>8}")
    for row in rows:
        row["floor_ms"] = row["touched_bytes"] / bandwidth * 1e3
        print(
            f"{row['tokens']:6} {row['touched']:8} {row['best_ms']:8.2f} {row['median_ms']:8.2f} "
            f"{row['floor_ms']:8.2f}"
        )
    if args.output:
        machine = {"cpu": platform.processor(), "devices": str(jax.devices()), "bytes_s": bandwidth}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def measure(shape: Case, tokens: int, repeats: int) -> list[dict[str, float]]:
    """A row for each number of experts touched: powers of two from `top_k` to all."""
    E, k = shape.experts, shape.top_k
    counts = [n for n in (1 << i for i in range(E.bit_length())) if k <= n < min(E, tokens * k)]
    counts.append(min(E, tokens * k))
    x, _, weights, gate_up, down = Case(tokens, k, E, shape.embed, shape.mlp).build()
    x, gate_up, down = (jnp.asarray(a, shape.dtype) for a in (x, gate_up, down))
    call = jax.jit(expert_parts)
    num_tokens = jnp.int32(tokens)

    def run(touched: int) -> Callable[[], jax.Array]:
        ids = jnp.asarray(spread(tokens, k, touched))
        return lambda: call(x, ids, weights, gate_up, down, num_tokens=num_tokens)

    calls = {touched: run(touched) for touched in counts}
    times: dict[int, list[float]] = {touched: [] for touched in counts}
    for turn in range(repeats + 1):
        for touched, function in calls.items():
            started = time.perf_counter()
            function().block_until_ready()
            if turn:  # the first compiles
                times[touched].append(time.perf_counter() - started)
    expert_bytes = (gate_up.nbytes + down.nbytes) // E
    return [
        {
            "tokens": tokens,
            "touched": touched,
            "best_ms": min(times[touched]) * 1e3,
            "median_ms": statistics.median(times[touched]) * 1e3,
            "touched_bytes": touched * expert_bytes,
        }
        for touched in counts
    ]


def spread(tokens: int, top_k: int, touched: int) -> np.ndarray:
    """Expert ids i32[T, k], distinct within a token, that use exactly `touched` experts evenly."""
    return (np.arange(tokens * top_k, dtype=np.int32) % touched).reshape(tokens, top_k)


def bandwidth_in_place() -> float:
    """Bytes read and written each second by the best pass over an array beyond any cache."""
    x = jnp.ones(1 << 26, jnp.float32)
    add = jax.jit(lambda x: x + 1.0, donate_argnames="x")
    x = add(x)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        x = add(x).block_until_ready()
        times.append(time.perf_counter() - started)
    return 2 * x.nbytes / min(times)


if __name__ == "__main__":
    main()
