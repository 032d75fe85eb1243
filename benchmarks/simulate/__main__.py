"""Which expert-parallel width for DeepSeek-V4-Pro on 64 hosts of 8 GPUs?

    python -m benchmarks.simulate [--seconds 240] [--load 0.25]

Prints the tables of docs/simulation.md. Needs no GPU: steps take what `cost.py` says.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import get_args

from benchmarks.simulate.cost import (
    GPUS_PER_HOST,
    H100,
    H200,
    Exchange,
    Gpu,
    Links,
    Model,
    Work,
    World,
    v4_pro,
)
from benchmarks.simulate.world import Outcome, Simulation, Traffic, kv_pages

WIDTHS = (8, 16, 32, 64, 128)
BUDGETS = (256, 2048)
NUM_REDUNDANT = 32
CONTEXT = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="Of traffic.")
    parser.add_argument("--load", type=float, default=0.25, help="Requests a second and GPU.")
    arguments = parser.parse_args()
    model = v4_pro()
    print(f"dense {model.dense / 1e9:.1f} G, an expert {model.expert / 1e6:.1f} M parameters\n")
    print_exchanges(model)
    print_decode(model)
    print_served(model, arguments.load, arguments.seconds)


def print_exchanges(model: Model) -> None:
    """Both ways, in one layer."""
    print("| us a layer: gather / padded | 8 rows | 64 | 256 | 2,048 |\n|---|---|---|---|---|")
    for width in WIDTHS:
        world = World(model, H100, Links(), width)
        cells = [
            " / ".join(f"{1e6 * world.exchange_seconds(e, rows):,.0f}" for e in get_args(Exchange))
            for rows in (8, 64, 256, 2048)
        ]
        print(f"| EP {width} | " + " | ".join(cells) + " |")
    print()


def print_decode(model: Model) -> None:
    """Steps of nothing but decodes, by the cost model alone."""
    print("| GPU | EP | weights GB | KV, k tokens | ms: 16 rows a GPU | 64 | 256 |")
    print("|---|---|---|---|---|---|---|")
    for gpu in (H100, H200):
        for width in WIDTHS:
            world = World(model, gpu, Links(), width)
            weights = model.weight_bytes(width, NUM_REDUNDANT) / 1e9
            room = kilotokens(world)
            cells = [f"| {gpu.name} | {width} | {weights:.0f}", f"{room:,.0f}" if room else "-"]
            for rows in (16, 64, 256):
                each = Work(rows, [(1, CONTEXT)] * rows)
                cells.append(f"{1e3 * world.seconds([each] * width, rows):.0f}")
            print(" | ".join(cells) + " |")
    print()


def print_served(model: Model, load: float, seconds: float) -> None:
    """Prompts and answers in the same worlds, by the engine's own scheduler."""
    print(f"{load} requests a second and GPU, prompts of 2.1k, answers of 380 tokens on average\n")
    print(
        "| GPU | EP | tokens a step and GPU | step ms p50 | TPOT ms p50 | TTFT s p50 | p99 "
        "| tokens/s/GPU | lost with a host |\n" + "|---" * 9 + "|"
    )
    for gpu in (H100, H200):
        for width in WIDTHS:
            world = World(model, gpu, Links(), width)
            if kilotokens(world):
                for budget in BUDGETS:
                    outcome = Simulation(world, budget, Traffic(load * width), seconds).run()
                    print(served_row(gpu, width, budget, outcome), flush=True)


def served_row(gpu: Gpu, width: int, budget: int, outcome: Outcome) -> str:
    lost = statistics.mean(outcome.running or [0]) * max(1, GPUS_PER_HOST / width)
    cells = [
        f"| {gpu.name} | {width} | {budget:,}",
        f"{1e3 * percentile(outcome.step_seconds, 0.5):,.0f}",
        f"{1e3 * percentile(outcome.per_token, 0.5):,.0f}",
        f"{percentile(outcome.first_token, 0.5):.1f}",
        f"{percentile(outcome.first_token, 0.99):.1f}",
        f"{outcome.num_tokens / outcome.seconds / width:.0f}",
        f"{lost:.0f}" + (f" ({outcome.num_waiting} wait)" if outcome.num_waiting else ""),
    ]
    return " | ".join(cells) + " |"


def kilotokens(world: World) -> float:
    """Of one GPU's KV cache; 0 if the weights leave no room."""
    try:
        pages = kv_pages(world, max(BUDGETS))
    except ValueError:
        return 0.0
    return (pages[0] - 1) * world.model.groups[0].page_size / 1000


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


if __name__ == "__main__":
    main()
