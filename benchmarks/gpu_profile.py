"""Kernel times from a profiler trace."""

import collections
import glob
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class KernelTime(NamedTuple):
    """Of one kernel name, over a whole trace."""

    count: int
    total_us: float


def kernel_times(run: Callable[[], Any], calls: int = 3) -> dict[str, KernelTime]:
    """Name -> launches and microseconds on the device over `calls` calls of `run`, which is warm.

    A trace shows kernels one by one: XLA launches them without its graphs while it is profiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([run() for _ in range(calls)])
        (path,) = glob.glob(folder + "/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
    counts: collections.Counter[str] = collections.Counter()
    totals: collections.Counter[str] = collections.Counter()
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    counts[event.name] += 1
                    totals[event.name] += event.duration_ns / 1e3
    return {name: KernelTime(counts[name], total) for name, total in totals.most_common()}
