"""Host time of a decode step, without a device: `python benchmarks/host_overhead.py [--check]`.

The real engine core runs a tiny model whose executables are replaced by nothing, so what is left of
a turn is what the host does: schedule, dispatch (pack the batch, pick the executable), collect,
update, tell the front end; then what the front end does with the message, on the other side.
Each request fills a page every 16 steps, so allocation and page hashing are included at their true
rate. Not included: the call of the executable itself, shown apart for as many buffers as Llama 8B
has. Medians of single turns. `--check` fails if a turn takes longer than its budget.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jengine.config import EngineConfig
from jengine.core.kv_manager import KVManager
from jengine.core.plan import StepPlan, StepResult
from jengine.core.scheduler import Scheduler
from jengine.engine import EngineCore
from jengine.input_processor import PreparedRequest
from jengine.kv_spec import KVKind, KVSpec, build_groups
from jengine.output_processor import OutputProcessor
from jengine.protocol import CoreRequest, FromCore, StepOutputs
from jengine.request import Request, RequestOutputKind, SamplingParams
from jengine.runtime.buckets import Bucket
from jengine.runtime.start import load_runner

PAGE_SIZE = 16
PROMPT_TOKENS = 512
NUM_TURNS = 400
BUDGET_MS = {1: 0.2, 64: 0.5, 256: 1.0}  # one turn of the engine's thread, for streamed requests
ADMITTED_TOKENS = (512, 8192, 131072)
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
PARTS = ("schedule", "dispatch", "collect", "update", "tell")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 over budget")
    check = parser.parse_args(argv).check
    print(f"one turn of the engine, microseconds (medians of {NUM_TURNS})")
    names = ("requests", "reported", "steps", *PARTS, "turn", "per step", "front end")
    print(" ".join(f"{name:>9}" for name in names))
    over: list[str] = []
    for num_requests, budget in BUDGET_MS.items():
        for is_streamed, num_steps in ((True, 1), (False, 1), (True, 8)):
            times = time_turns(num_requests, is_streamed=is_streamed, num_steps=num_steps)
            turn = sum(times[part] for part in PARTS)
            how = "each step" if is_streamed else "at end"
            cells = [times[part] for part in PARTS] + [turn, turn / num_steps, times["front end"]]
            print(
                f"{num_requests:>9} {how:>9} {num_steps:>9} "
                + " ".join(f"{cell:>9.0f}" for cell in cells)
            )
            if turn / num_steps > budget * 1000:
                over.append(f"{num_requests} requests: {turn:.0f} us, budget {budget * 1000:.0f}")
    print(f"call of an executable with {NUM_BUFFERS} buffers: {time_call():.0f} us")
    print("admission of one prompt, microseconds (median of 20)")
    for num_tokens in ADMITTED_TOKENS:
        cold, warm = time_admission(num_tokens)
        print(f"{num_tokens:>9} tokens: cold {cold:>9.0f}   prefix hit {warm:>9.0f}")
    for line in over:
        print(f"over budget: {line}", file=sys.stderr)
    return int(check and bool(over))


def time_turns(num_requests: int, *, is_streamed: bool, num_steps: int) -> dict[str, float]:
    """Median microseconds of each part of a turn that decodes `num_requests` sequences."""
    messages: list[FromCore] = []
    core = _make_core(num_requests, num_steps, messages)
    times: dict[str, list[float]] = defaultdict(list)
    _time_method(core.scheduler, "schedule", times)
    _time_method(core.runner, "dispatch", times)
    _time_method(core.runner, "collect", times)
    _time_method(core.scheduler, "update", times)
    _time_method(core, "_report", times, "tell")
    front = OutputProcessor(None)
    sampling = SamplingParams(
        temperature=0.8,
        top_p=0.9,
        max_tokens=(NUM_TURNS + 100) * num_steps,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if is_streamed else RequestOutputKind.FINAL_ONLY,
    )
    for i in range(num_requests):
        prompt = [(i * 7 + j) % 127 for j in range(PROMPT_TOKENS)]
        child = CoreRequest(
            str(i), prompt, sampling, [], i, 0, str(i), time.time(), is_streamed=is_streamed
        )
        front.add(PreparedRequest(str(i), None, prompt, sampling, time.time(), (child,)))
        core.submit(child)
    while core.scheduler.num_waiting or not core.scheduler.num_running:
        core.turn()
    for _ in range(50):  # the last prompts, and warm caches
        core.turn()
    times.clear()
    messages.clear()
    for _ in range(NUM_TURNS):
        core.turn()
        started = time.perf_counter()
        for message in messages:
            assert isinstance(message, StepOutputs)
            for state in front.process(message)[0]:
                state.take()
        times["front end"].append((time.perf_counter() - started) * 1e6)
        messages.clear()
    return {name: statistics.median(values) for name, values in times.items()}


def _make_core(num_requests: int, num_steps: int, messages: list[FromCore]) -> EngineCore:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        tokens = PROMPT_TOKENS + (NUM_TURNS + 100) * num_steps
        config = EngineConfig.from_kwargs(
            folder,
            dtype="float32",
            load_format="dummy",
            max_num_seqs=num_requests,
            max_num_batched_tokens=8192,
            num_pages=max(num_requests * tokens, MODEL["max_position_embeddings"]) // PAGE_SIZE
            + num_requests
            + 1,
            page_size=PAGE_SIZE,
            keep_executables=False,
            max_decode_steps=num_steps,
        )
        runner = load_runner(config)
    programs = _NoPrograms(num_requests, num_steps, runner.buckets)
    runner.programs = programs  # type: ignore[assignment]
    core = EngineCore(config, messages.append)
    core.attach(runner)
    return core


class _NoPrograms:
    """Executables that return at once, and always sample token 7."""

    num_late = num_pending = 0

    def __init__(self, num_seqs: int, num_steps: int, buckets: tuple[Bucket, ...]) -> None:
        self.usable_buckets = buckets
        sampled = _Sampled(num_seqs, num_steps)
        self._output = argparse.Namespace(sampled=sampled)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return lambda params, kv, rows, packed, masks: (kv, rows, self._output)


class _Sampled:
    """Stands for the device array of sampled ids."""

    def __init__(self, num_seqs: int, num_steps: int) -> None:
        self._array = np.full((2, num_steps, num_seqs), 7, np.int32)

    def copy_to_host_async(self) -> None:
        """It is there already."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._array


def _time_method(
    owner: object, method: str, times: dict[str, list[float]], name: str | None = None
) -> None:
    inner = getattr(owner, method)

    def timed(*args: Any) -> Any:
        started = time.perf_counter()
        result = inner(*args)
        times[name or method].append((time.perf_counter() - started) * 1e6)
        return result

    setattr(owner, method, timed)


NUM_LAYERS = 32
NUM_BUFFERS = NUM_LAYERS * 8 + 4 + 4  # parameters, KV arrays, rows


def time_call() -> float:
    """Microseconds to call an executable that does nothing but hand its KV arrays back."""
    leaves = tuple(jnp.zeros((8,)) for _ in range(NUM_LAYERS * 7 + 4))
    kv = tuple(jnp.zeros((8,)) for _ in range(NUM_LAYERS))
    rows = tuple(jnp.zeros((8,)) for _ in range(4))
    packed = np.zeros(50_000, np.int32)

    def step(leaves: Any, kv: Any, rows: Any, packed: Any) -> Any:
        return kv, rows, packed[:256] + 1

    jitted = jax.jit(step, donate_argnames=("kv", "rows"))
    compiled = jitted.lower(leaves, kv, rows, packed).compile()
    times = []
    for _ in range(300):
        started = time.perf_counter()
        kv, rows, output = compiled(leaves, kv, rows, packed)
        times.append((time.perf_counter() - started) * 1e6)
        output.block_until_ready()
    return statistics.median(times)


def time_admission(num_tokens: int) -> tuple[float, float]:
    """Microseconds from `add` to the first plan: of a new prompt, and of one whose pages are
    cached."""
    cold, warm = [], []
    groups = build_groups([KVSpec(KVKind.FULL, (2, 8, 128), "bfloat16", 2)], PAGE_SIZE)
    for i in range(20):
        kv = KVManager(groups, [num_tokens // PAGE_SIZE + 16], enable_prefix_caching=True)
        config = EngineConfig.from_kwargs("m", max_num_seqs=8, max_num_batched_tokens=8192)
        scheduler = Scheduler(config.scheduler, kv, max_model_len=1 << 20)
        prompt = [i + j for j in range(num_tokens)]
        for times in (cold, warm):
            request = Request("r", prompt, SamplingParams(max_tokens=1))
            started = time.perf_counter()
            scheduler.add(request)
            plan = _schedule(scheduler)
            times.append((time.perf_counter() - started) * 1e6)
            while not request.is_finished:
                scheduler.update(plan, StepResult([[7]] * len(plan.scheduled)))
                plan = scheduler.schedule() or plan
    return statistics.median(cold), statistics.median(warm)


def _schedule(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    if plan is None:
        raise RuntimeError("the scheduler has nothing to do")
    return plan


if __name__ == "__main__":
    sys.exit(main())
