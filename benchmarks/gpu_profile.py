"""Kernel times from a profiler trace."""

import collections
import glob
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

MARKS = ("decode_chunk", "decode_latent_split")  # kernels of which every layer runs one, once
TRACED = 40  # steps of a trace, the first of them with prompts


class KernelTime(NamedTuple):
    """Of one kernel name, over a whole trace."""

    count: int
    total_us: float


def kernel_times(run: Callable[[], Any], calls: int = 3) -> dict[str, KernelTime]:
    """Name -> launches and microseconds on the device over `calls` calls of `run`, which is warm.

    XLA launches the kernels of a graph one by one while it is profiled, unless told otherwise.
    """
    counts: collections.Counter[str] = collections.Counter()
    totals: collections.Counter[str] = collections.Counter()
    for name, start, end in trace_events(
        lambda: jax.block_until_ready([run() for _ in range(calls)])
    ):
        counts[name] += 1
        totals[name] += (end - start) / 1e3
    return {name: KernelTime(counts[name], total) for name, total in totals.most_common()}


def report_decode(run: Callable[[int], Any], layers: int, *, first: int, top: int) -> float | None:
    """Print what the kernels of a decode step take, the largest first, and return milliseconds of
    all of them. `run` generates so many tokens; from step `first` on all requests decode.

    None for several steps a dispatch: a trace does not see into a loop that is a graph.
    """
    events = sorted(trace_events(lambda: run(TRACED + 1)), key=lambda event: event[1])
    marks = [i for i, event in enumerate(events) if event[0] in MARKS]
    steps = TRACED - 1 - first
    if steps < 1 or len(marks) <= layers * (first + steps):
        print("    no kernels in the trace")
        return None
    totals: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for name, start, end in events[marks[layers * first] : marks[layers * (first + steps)]]:
        totals[name] += (end - start) / 1e3
        counts[name] += 1
    milliseconds = sum(totals.values()) / steps / 1e3
    print(f"    kernels {milliseconds:.3f} ms a step")
    for name, us in totals.most_common(top):
        print(
            f"    {us / steps:8.1f} us, {counts[name] / steps:5.1f} of {us / counts[name]:6.1f}: "
            f"{name[:60]}"
        )
    return milliseconds


def trace_events(run: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """(name, start, end) in nanoseconds of everything that ran on the device."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = glob.glob(folder + "/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
    return [
        (event.name, event.start_ns, event.start_ns + event.duration_ns)
        for plane in data.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
