"""A server under random load for as long as you like: memory flat, pages conserved, latency flat.

    python -m tests.hostile.soak --minutes 30 [--model FOLDER]

Without `--model` it serves a tiny random Llama. The pool is too small for the load, so that
requests are preempted; a quarter of the clients leave early. Once a second a probe asks the same
thing: its tokens may never change. Prints one line of JSON; exits with 1 if something grew, slowed
or leaked.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.live import LiveServer, live_server
from tests.hostile.wire import COMPLETIONS, ask_json, request_bytes, tokens_of

NUM_CLIENTS = 10
SAMPLE_SECONDS = 5.0
PROBE_SECONDS = 1.0
FLAGS = ("--max-model-len", "256", "--num-gpu-blocks-override", "48")
PROBE = {"prompt": "The quick brown fox", "temperature": 0, "max_tokens": 16, "ignore_eos": True}
# What the first tenth may not be compared with: buckets are touched for the first time, allocators
# and caches fill.
WARM_UP = 0.1
MAX_GROWTH_BYTES = 16 * 2**20
MAX_SLOWDOWN = 1.5


@dataclass
class Record:
    num_requests: int = 0
    num_cancelled: int = 0
    num_refused: int = 0
    wrong_probes: int = 0
    latencies: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Medians of the first and the last third after the warm-up."""
        first, last = thirds(self.latencies)
        low, high = thirds([float(value) for value in self.resident])
        return {
            "requests": self.num_requests,
            "cancelled": self.num_cancelled,
            "refused": self.num_refused,
            "wrong_probes": self.wrong_probes,
            "probes": len(self.latencies),
            "probe_ms": [round(first * 1e3, 1), round(last * 1e3, 1)],
            "resident_mb": [round(low / 2**20, 1), round(high / 2**20, 1)],
        }

    def faults(self) -> list[str]:
        first, last = thirds(self.latencies)
        low, high = thirds([float(value) for value in self.resident])
        checks = {
            "a probe's tokens changed": self.wrong_probes > 0,
            "latency grew": last > first * MAX_SLOWDOWN,
            "memory grew": high - low > MAX_GROWTH_BYTES,
            "requests were refused": self.num_refused > 0,
        }
        return [name for name, is_wrong in checks.items() if is_wrong]


def thirds(values: list[float]) -> tuple[float, float]:
    kept = values[int(len(values) * WARM_UP) :]
    size = max(len(kept) // 3, 1)
    return statistics.median(kept[:size]), statistics.median(kept[-size:])


async def soak(server: LiveServer, seconds: float, seed: int = 0) -> Record:
    record = Record()
    until = time.monotonic() + seconds
    tasks = [
        _client(server, random.Random(seed * 1000 + index), until, record)
        for index in range(NUM_CLIENTS)
    ]
    await asyncio.gather(_probe(server, until, record), _sample(server, until, record), *tasks)
    return record


async def _client(server: LiveServer, rng: random.Random, until: float, record: Record) -> None:
    while time.monotonic() < until:
        body = {
            "prompt": [rng.randrange(3, 400) for _ in range(rng.randrange(1, 180))],
            "max_tokens": rng.randrange(1, 70),
            "temperature": rng.choice([0, 0.7, 1.3]),
            "seed": rng.randrange(100),
            "stream": rng.random() < 0.7,
            "logprobs": rng.choice([None, None, 3]),
            "stop": rng.choice([None, None, ["e"]]),
        }
        data = request_bytes(COMPLETIONS, json.dumps(body).encode())
        leaves_after = rng.randrange(8) if rng.random() < 0.25 else None
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
        writer.write(data)
        record.num_requests += 1
        if leaves_after is None:
            raw = await reader.read(-1)
            record.num_refused += not raw.startswith(b"HTTP/1.1 200")
        else:
            record.num_cancelled += 1
            for _ in range(leaves_after):
                await reader.read(64)
        writer.transport.abort()


async def _probe(server: LiveServer, until: float, record: Record) -> None:
    expected: list[int] | None = None
    body = {**PROBE, "return_token_ids": True}
    while time.monotonic() < until:
        started = time.monotonic()
        tokens = tokens_of(await ask_json(server.http_port, COMPLETIONS, body))
        record.latencies.append(time.monotonic() - started)
        expected = tokens if expected is None else expected
        record.wrong_probes += tokens != expected
        await asyncio.sleep(PROBE_SECONDS)


async def _sample(server: LiveServer, until: float, record: Record) -> None:
    while time.monotonic() < until:
        record.resident.append(server.resident_bytes())
        await asyncio.sleep(SAMPLE_SECONDS)


def run(model: str, seconds: float, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(figures, what is wrong)."""
    with live_server(folder / "server.log", *FLAGS, model=model) as server:
        record = asyncio.run(soak(server, seconds))
        server.wait_idle()
        figures = {**record.report(), "preemptions": server.metric("vllm:num_preemptions_total")}
        faults = record.faults()
        if not figures["preemptions"]:
            faults.append("nobody was preempted")
        figures["pages_left_in_use"] = server.load()["num_pages_used"]
    return figures, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--model", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jengine-soak-") as scratch:
        model = options.model
        if not model:
            from tests.oracles.tiny_llama import make_tiny_llama

            model = f"{scratch}/tiny_llama"
            make_tiny_llama(Path(model))
        figures, faults = run(model, options.minutes * 60, Path(scratch))
    print(json.dumps({"minutes": options.minutes, **figures, "faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
