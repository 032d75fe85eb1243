"""Decode and prefill of a model shape through `LLM.generate`, with dummy weights.

    python -m benchmarks.gpu_table llama31_8b [--decode 1x1024 ...] [--json FILE]

`shapes.json` maps names to the contents of a config.json, of which `--num-layers` keeps the first
layers. Prefill is the time of the whole batch for one token each; a decode step is (time for 129
tokens - time for 1) / 128, scheduler and all. Best of `--repeats` runs; greedy, token ids in and
out, no prefix caching, bfloat16 but for weights that the shape packs.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.gpu_profile import report_decode
from jengine import LLM, SamplingParams

STEPS = 128
BUDGET = 8192  # tokens of a step
DECODE = ("1x1024", "8x1024", "32x1024", "64x1024", "128x1024", "256x512")
PREFILL = ("1x128", "1x1024", "1x8192", "8x2048")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a shape in the file")
    parser.add_argument("--shapes", type=Path, default=Path(__file__).with_name("shapes.json"))
    parser.add_argument("--decode", nargs="*", default=DECODE)
    parser.add_argument("--prefill", nargs="*", default=PREFILL)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-model-len", type=int, default=8704)
    parser.add_argument("--max-decode-steps", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--num-layers", type=int, help="keep so many of the shape's first layers")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--dequantize", action="store_true")
    parser.add_argument("--compile-threads", type=int)
    parser.add_argument("--decode-buckets", type=int, nargs="*", default=())
    parser.add_argument("--prefill-buckets", type=int, nargs="*", default=())
    parser.add_argument(
        "--kernels",
        nargs="*",
        default=(),
        help="decode cases to trace as well, one step a dispatch",
    )
    parser.add_argument("--batch-invariant", action=argparse.BooleanOptionalAction)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads(options.shapes.read_text())[options.name]
        if options.num_layers is not None:
            config = first_layers(config, options.num_layers)
        Path(folder, "config.json").write_text(json.dumps(config))
        started = time.perf_counter()
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=options.max_model_len,
            max_num_seqs=256,
            max_num_batched_tokens=BUDGET,
            max_decode_steps=options.max_decode_steps,
            enable_prefix_caching=False,
            decode_buckets=tuple(options.decode_buckets),
            prefill_buckets=tuple(options.prefill_buckets),
            compile_threads=options.compile_threads,
            batch_invariant=options.batch_invariant,
            tensor_parallel_size=options.tensor_parallel_size,
            enable_expert_parallel=options.enable_expert_parallel,
            dequantize=options.dequantize,
        )
        ready = time.perf_counter() - started
        llm.wait_until_compiled()
        print(f"ready after {ready:.1f} s, all executables {time.perf_counter() - started:.1f} s")
        rows = measure(llm, config["vocab_size"], options)
        report_memory(llm)
        for case in options.kernels:
            batch, length = map(int, case.split("x"))
            print(f"kernels of decode {case}")
            prompts = prompts_of(batch, length, config["vocab_size"], 9)
            kernels = report_decode(
                lambda tokens, prompts=prompts: timed(llm, prompts, greedy(tokens)),
                config["num_hidden_layers"],
                first=-(-batch * length // BUDGET) + 1,
                top=16,
            )
            if kernels and (step := rows.get(f"decode {case}")):
                print(f"    the device is idle for {1 - kernels / step:.3f} of the step")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def first_layers(config: dict[str, Any], count: int) -> dict[str, Any]:
    """The config of a shallower model. What lists have past the layers, of draft blocks, stays."""
    whole = config["num_hidden_layers"]
    if not 1 <= count <= whole:
        raise ValueError(f"num_layers must be within 1..{whole}, got {count}")
    cut = {
        name: value[:count] + value[whole:]
        for name, value in config.items()
        if isinstance(value, list) and len(value) >= whole
    }
    return {**config, **cut, "num_hidden_layers": count}


def measure(llm: LLM, vocab_size: int, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds by row."""
    rows: dict[str, float] = {}
    for kind, cases in (("prefill", options.prefill), ("decode", options.decode)):
        for case in cases:
            batch, length = map(int, case.split("x"))
            one = best(llm, batch, length, vocab_size, 1, options.repeats)
            ms = one * 1e3
            if kind == "decode":
                many = best(llm, batch, length, vocab_size, STEPS + 1, options.repeats)
                ms = (many - one) / STEPS * 1e3
            rows[f"{kind} {case}"] = ms
            print(f"{kind} {case}: {ms:.2f} ms", flush=True)
    return rows


def report_memory(llm: LLM) -> None:
    """The memory plan beside what the device says now that the largest steps have run."""
    plan = llm._core.runner.memory_plan()
    stats: Any = jax.local_devices()[0].memory_stats()
    peak = stats["peak_bytes_in_use"]
    print(plan.table())
    print(
        f"the device's peak is {peak / 2**20:,.1f} MiB, {peak / plan.peak - 1:+.2%} of the plan's"
    )


def best(
    llm: LLM, batch: int, length: int, vocab_size: int, max_tokens: int, repeats: int
) -> float:
    """Seconds of the fastest of `repeats` runs, after one to warm up."""
    seconds = [
        timed(llm, prompts_of(batch, length, vocab_size, run), greedy(max_tokens))
        for run in range(repeats + 1)
    ]
    return min(seconds[1:])


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def prompts_of(batch: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(100, vocab_size, length).tolist() for _ in range(batch)]


def timed(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams) -> float:
    started = time.perf_counter()
    outputs: Any = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - started
    if any(len(o.outputs[0].token_ids) != params.max_tokens for o in outputs):
        raise RuntimeError("a request ended early")
    return elapsed


if __name__ == "__main__":
    main()
