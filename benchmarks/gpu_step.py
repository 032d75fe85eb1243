"""Where a decode step's time goes on a GPU: the engine's step, its host parts, its kernels.

    python -m benchmarks.gpu_step llama31_8b [--batches 1 8 64] [--context 1024]

The step is timed through `LLM.generate` as in `gpu_table.py`; `dispatch` and `collect` are medians
of the engine thread's calls in the same run. Kernels come from a trace of a further run, in which
XLA launches them one by one: their sum is what the device works on a step, the rest is waiting.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_profile import report_decode
from benchmarks.gpu_table import BUDGET, greedy, prompts_of, timed
from jengine import LLM

STEPS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a shape in the file")
    parser.add_argument("--shapes", type=Path, default=Path(__file__).with_name("shapes.json"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--top", type=int, default=14)
    options = parser.parse_args()
    config = json.loads(options.shapes.read_text())[options.name]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=8704,
            max_num_seqs=256,
            max_num_batched_tokens=BUDGET,
            enable_prefix_caching=False,
            background_compile=False,
        )
        for batch in options.batches:
            measure(llm, batch, options, config)


def measure(llm: LLM, batch: int, options: argparse.Namespace, config: dict[str, Any]) -> None:
    runner = llm._core.runner
    calls: dict[str, list[float]] = {"dispatch": [], "collect": []}
    originals = {name: getattr(runner, name) for name in calls}
    for name, call in originals.items():
        setattr(runner, name, _recorded(call, calls[name]))
    prompts = prompts_of(batch, options.context, config["vocab_size"], 9)
    timed(llm, prompts, greedy(2))
    one = timed(llm, prompts, greedy(1))
    for times in calls.values():
        times.clear()
    step = (timed(llm, prompts, greedy(STEPS + 1)) - one) / STEPS
    host = {name: statistics.median(times[-STEPS:]) for name, times in calls.items()}
    for name, call in originals.items():
        setattr(runner, name, call)
    print(
        f"batch {batch}: step {step * 1e3:.3f} ms, dispatch {host['dispatch'] * 1e3:.3f}, "
        f"collect {host['collect'] * 1e3:.3f}",
        flush=True,
    )
    report_decode(
        lambda tokens: timed(llm, prompts, greedy(tokens)),
        config["num_hidden_layers"],
        first=-(-batch * options.context // BUDGET) + 1,
        top=options.top,
    )


def _recorded(call: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        started = time.perf_counter()
        result = call(*args)
        times.append(time.perf_counter() - started)
        return result

    return run


if __name__ == "__main__":
    main()
