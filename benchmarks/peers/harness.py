"""What every engine is measured on, and how. Standard library only: peers have their own venvs.

An engine is one function, `generate(prompts, num_tokens)`: greedy, exactly `num_tokens` new tokens
for each prompt, nothing stops early. Decode speed is the difference between generating many tokens
and one, so that no engine is charged its prefill and none needs hooks inside.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], None]

PREFILL_TOKENS = 512
DECODE_BATCHES = (1, 8, 32)
DECODE_PROMPT_TOKENS = 32
DECODE_TOKENS = 64
FIRST_ORDINARY_ID = 1000  # past the special tokens of every tokenizer we meet
MAX_MODEL_LEN = 1024


def run(name: str, build: Callable[[argparse.Namespace], tuple[Generate, dict[str, Any]]]) -> None:
    """Parse the common arguments, build the engine, measure it, write one JSON file.

    `build` returns the engine and what identifies it (version, dtype, weights).
    """
    parser = argparse.ArgumentParser(description=f"Measure {name}.")
    parser.add_argument("--model", required=True, help="GGUF file or Hugging Face folder")
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=list(DECODE_BATCHES))
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    args = parser.parse_args()
    generate, identity = build(args)
    results = measure(generate, args.vocab_size, args.batches, args.repeats)
    document = {"engine": name, "threads": args.threads, **identity, "results": results}
    args.json.write_text(json.dumps(document, indent=2) + "\n")
    for case, result in results.items():
        print(f"{name}: {case}: {result['median']:.1f} tok/s of {result['runs']}", flush=True)


def measure(
    generate: Generate, vocab_size: int, batches: Sequence[int], repeats: int
) -> dict[str, dict[str, Any]]:
    """Tokens per second for `prefill_512` and `decode_<batch>`: all runs and their median."""
    # Fresh random prompts for every call, so that no prefix cache helps; the same for every engine.
    rng = random.Random(0)

    def prompts(batch: int, length: int) -> list[list[int]]:
        ids = range(FIRST_ORDINARY_ID, vocab_size)
        return [rng.choices(ids, k=length) for _ in range(batch)]

    def seconds(batch: int, length: int, num_tokens: int) -> float:
        given = prompts(batch, length)
        start = time.perf_counter()
        generate(given, num_tokens)
        return time.perf_counter() - start

    seconds(1, PREFILL_TOKENS, 1)  # warm-up
    prefill = [PREFILL_TOKENS / seconds(1, PREFILL_TOKENS, 1) for _ in range(repeats)]
    results = {f"prefill_{PREFILL_TOKENS}": _summary(prefill)}
    for batch in batches:
        seconds(batch, DECODE_PROMPT_TOKENS, 4)  # warm-up
        one = statistics.median(seconds(batch, DECODE_PROMPT_TOKENS, 1) for _ in range(repeats))
        speeds = [
            batch * DECODE_TOKENS / (seconds(batch, DECODE_PROMPT_TOKENS, 1 + DECODE_TOKENS) - one)
            for _ in range(repeats)
        ]
        results[f"decode_{batch}"] = _summary(speeds)
    return results


def _summary(runs: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(runs), 1), "runs": [round(x, 1) for x in runs]}
