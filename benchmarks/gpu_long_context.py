"""Inter-token latency of short requests while one long prompt is computed in chunks.

    python -m benchmarks.gpu_long_context llama31_8b [--prompt 131000] [--short 32]

A chunk's time is that of the long prompt's first token over its number of chunks. The latencies
counted are those between the long prompt's arrival and its first token. Also the decode step of
requests with long contexts, as many as fit (`--batch` x `--context`).
"""

import argparse
import asyncio
import itertools
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.gpu_table import prompts_of
from jengine import AsyncEngine, EngineConfig, SamplingParams
from jengine.request import RequestOutputKind

BUDGET = 8192
SHORT_PROMPT = 128
LONG_DECODE = 64


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a shape in the file")
    parser.add_argument("--shapes", type=Path, default=Path(__file__).with_name("shapes.json"))
    parser.add_argument("--prompt", type=int, default=131000)
    parser.add_argument("--short", type=int, default=32)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--context", type=int, default=32768)
    options = parser.parse_args()
    config = json.loads(options.shapes.read_text())[options.name]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        engine = await AsyncEngine.create(
            EngineConfig.from_kwargs(
                folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_num_seqs=64,
                max_num_batched_tokens=BUDGET,
                enable_prefix_caching=False,
                background_compile=False,
            )
        )
        try:
            await interference(engine, config["vocab_size"], options)
            await long_decode(engine, config["vocab_size"], options)
        finally:
            await engine.shutdown()


async def interference(engine: AsyncEngine, vocab_size: int, options: argparse.Namespace) -> None:
    arrivals: list[list[float]] = [[] for _ in range(options.short)]
    stop = asyncio.Event()

    async def short(index: int) -> None:
        (prompt,) = prompts_of(1, SHORT_PROMPT, vocab_size, index)
        async for _ in engine.generate(prompt, _params(1 << 14), f"short-{index}"):
            arrivals[index].append(time.perf_counter())
            if stop.is_set():
                return

    tasks = [asyncio.create_task(short(i)) for i in range(options.short)]
    while not all(arrivals):
        await asyncio.sleep(0.01)
    (prompt,) = prompts_of(1, options.prompt, vocab_size, 10**6)
    started = time.perf_counter()
    async for _ in engine.generate(prompt, _params(1), "long"):
        pass
    first_token = time.perf_counter()
    stop.set()
    await asyncio.gather(*tasks)
    gaps = [
        later - earlier
        for times in arrivals
        for earlier, later in itertools.pairwise(times)
        if earlier >= started and later <= first_token
    ]
    chunk = (first_token - started) / math.ceil(options.prompt / (BUDGET - options.short))
    p50, p99 = np.percentile(gaps, [50, 99])
    print(
        f"{options.prompt} tokens in {first_token - started:.2f} s, {chunk * 1e3:.0f} ms a chunk; "
        f"{options.short} short requests: p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms "
        f"= {p99 / chunk:.2f} chunks",
        flush=True,
    )


async def long_decode(engine: AsyncEngine, vocab_size: int, options: argparse.Namespace) -> None:
    """The step while all requests decode."""
    prompts = prompts_of(options.batch, options.context, vocab_size, 1)
    num_tokens = 4 * options.batch + LONG_DECODE  # the first still runs when the last has begun
    arrivals: list[list[tuple[float, int]]] = [[] for _ in prompts]  # (time, tokens so far)

    async def one(index: int) -> None:
        count = 0
        async for output in engine.generate(prompts[index], _params(num_tokens), f"c-{index}"):
            count += len(output.outputs[0].token_ids)
            arrivals[index].append((time.perf_counter(), count))

    await asyncio.gather(*(one(i) for i in range(options.batch)))
    all_started = max(request[0][0] for request in arrivals)
    one_ended = min(request[-1][0] for request in arrivals)
    inside = [(at, n) for at, n in arrivals[0] if all_started <= at <= one_ended]
    (first, few), (last, many) = inside[0], inside[-1]
    print(f"{options.batch} x {options.context}: step {(last - first) / (many - few) * 1e3:.2f} ms")


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


if __name__ == "__main__":
    asyncio.run(main())
