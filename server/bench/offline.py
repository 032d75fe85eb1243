"""`jengine bench latency | throughput | startup`: the engine without a server, with vLLM's
arguments and JSON keys.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jengine.async_engine import AsyncEngine
from jengine.config import EngineConfig
from jengine.outputs import RequestOutput
from jengine.request import RequestOutputKind, SamplingParams
from jengine.server.bench.prompts import RandomShape, Sample, random_samples
from jengine.server.bench.stats import percentile_table

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class LatencyOptions:
    """Flags of `vllm bench latency`."""

    input_len: int = 32
    output_len: int = 128
    batch_size: int = 8
    n: int = 1
    num_iters_warmup: int = 10
    num_iters: int = 30
    detokenize: bool = True


async def latency(config: EngineConfig, options: LatencyOptions, report: Report) -> dict[str, Any]:
    """Seconds for a whole batch, again and again. Prompts are new each time: nothing comes from the
    prefix cache.
    """
    engine = await AsyncEngine.create(config)
    try:
        await engine.wait_until_compiled()
        params = SamplingParams(
            n=options.n,
            temperature=1.0,
            ignore_eos=True,
            max_tokens=options.output_len,
            detokenize=options.detokenize,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        shape = RandomShape(options.input_len, options.output_len)
        seconds: list[float] = []
        for iteration in range(options.num_iters_warmup + options.num_iters):
            samples = random_samples(
                options.batch_size, shape, engine.model_info.vocab_size, seed=iteration
            )
            elapsed, _ = await timed_batch(engine, samples, [params] * len(samples))
            if iteration >= options.num_iters_warmup:
                seconds.append(elapsed)
                report(f"iteration {len(seconds)}/{options.num_iters}: {elapsed:.4f} s")
    finally:
        await engine.shutdown()
    return {
        "avg_latency": float(np.mean(seconds)),
        "latencies": seconds,
        "percentiles": percentile_table(seconds),
    }


async def throughput(
    config: EngineConfig, make_samples: Callable[[int], Sequence[Sample]], *, detokenize: bool
) -> dict[str, Any]:
    """All requests at once. `make_samples` gets the vocabulary's size."""
    engine = await AsyncEngine.create(config)
    try:
        await engine.wait_until_compiled()
        samples = make_samples(engine.model_info.vocab_size)
        params = [
            SamplingParams(
                temperature=1.0,
                ignore_eos=True,
                max_tokens=sample.output_len,
                detokenize=detokenize,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for sample in samples
        ]
        elapsed, outputs = await timed_batch(engine, samples, params)
    finally:
        await engine.shutdown()
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": num_prompt + num_output,
        "total_output_tokens": num_output,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": (num_prompt + num_output) / elapsed,
        "output_tokens_per_second": num_output / elapsed,
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """One start of an engine in a process of its own."""

    seconds: float  # from nothing to ready
    compile_seconds: float  # of those: making executables ready
    complete_seconds: float  # until nothing was being compiled any more
    num_compiled: int
    phases: dict[str, float]


async def startup(
    config: EngineConfig, *, num_cold: int, num_warmup: int, num_warm: int, report: Report
) -> dict[str, Any]:
    """Seconds until an engine process is ready: with an empty cache of executables, and with a
    filled one.
    """
    cold: list[Start] = []
    for i in range(num_cold):
        with tempfile.TemporaryDirectory(prefix="jengine-cold-") as folder:
            compiling = dataclasses.replace(config.compile, cache_dir=folder)
            cold.append(await start_once(dataclasses.replace(config, compile=compiling)))
        report(f"cold {i + 1}/{num_cold}: {describe_start(cold[-1])}")
    for _ in range(num_warmup):
        await start_once(config)
    warm: list[Start] = []
    for i in range(num_warm):
        warm.append(await start_once(config))
        report(f"warm {i + 1}/{num_warm}: {describe_start(warm[-1])}")
    return startup_figures("cold", cold) | startup_figures("warm", warm)


def startup_figures(kind: str, starts: Sequence[Start]) -> dict[str, Any]:
    """vLLM's keys, and ours: what was compiled, and the parts of a start."""
    if not starts:
        return {}
    figures: dict[str, Any] = {}
    for part, seconds in (
        ("startup", [start.seconds for start in starts]),
        ("compilation", [start.compile_seconds for start in starts]),
        ("complete", [start.complete_seconds for start in starts]),
    ):
        figures[f"avg_{kind}_{part}_time"] = float(np.mean(seconds))
        figures[f"{kind}_{part}_times"] = seconds
        figures[f"{kind}_{part}_percentiles"] = percentile_table(seconds)
    figures[f"{kind}_num_compiled"] = [start.num_compiled for start in starts]
    figures[f"{kind}_phases"] = {
        name: float(np.mean([start.phases[name] for start in starts])) for name in starts[0].phases
    }
    return figures


def describe_start(start: Start) -> str:
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in start.phases.items())
    return f"{start.seconds:.2f} s, {start.num_compiled} compiled ({phases})"


async def start_once(config: EngineConfig) -> Start:
    """Start an engine, let it compile to the end, and stop it."""
    started = time.perf_counter()
    engine = await AsyncEngine.create(config)
    elapsed = time.perf_counter() - started
    ready = engine.ready
    await engine.wait_until_compiled()  # or a warm start would find half of it
    complete = time.perf_counter() - started
    await engine.shutdown()
    phases = {"process and imports": elapsed - ready.startup_seconds, **ready.phases}
    num_compiled = ready.num_compiled + ready.num_compiling
    return Start(elapsed, ready.compile_seconds, complete, num_compiled, phases)


async def timed_batch(
    engine: AsyncEngine, samples: Sequence[Sample], params: Sequence[SamplingParams]
) -> tuple[float, list[RequestOutput]]:
    """Run all samples together; seconds and final outputs."""

    async def one(index: int) -> RequestOutput:
        final: RequestOutput | None = None
        prompt = samples[index].prompt
        async for output in engine.generate(prompt, params[index], f"bench-{index}"):
            final = output
        assert final is not None
        return final

    started = time.perf_counter()
    outputs = await asyncio.gather(*(one(index) for index in range(len(samples))))
    return time.perf_counter() - started, list(outputs)
