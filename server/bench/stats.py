"""From samples of requests to the figures of `vllm bench serve`, key for key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

OFFLINE_PERCENTILES = (10, 25, 50, 75, 90, 99)
METRICS = ("ttft", "tpot", "itl", "e2el")
TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


@dataclass(slots=True)
class RequestResult:
    """What one request did. Times are seconds of `time.perf_counter`."""

    prompt_len: int
    start_time: float = 0.0
    success: bool = False
    latency: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    output_tokens: int = 0
    generated_text: str = ""
    error: str = ""

    @property
    def tpot(self) -> float:
        """Mean time per token after the first; 0 for a single token."""
        rest = self.output_tokens - 1
        return (self.latency - self.ttft) / rest if rest > 0 else 0.0


def serving_figures(
    results: Sequence[RequestResult],
    duration: float,
    percentiles: Sequence[float],
    goodput: Mapping[str, float],
) -> dict[str, Any]:
    """`goodput` maps ttft, tpot, e2el to the most milliseconds a good request may take."""
    good = [result for result in results if result.success]
    num_in = sum(result.prompt_len for result in good)
    num_out = sum(result.output_tokens for result in good)
    series = {
        "ttft": [r.ttft for r in good],
        "tpot": [r.tpot for r in good if r.output_tokens > 1],
        "itl": [gap for r in good for gap in r.itl],
        "e2el": [r.latency for r in good],
    }
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(results) - len(good),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(good) / duration,
        "request_goodput": (
            sum(is_good(result, goodput) for result in good) / duration if goodput else None
        ),
        "output_throughput": num_out / duration,
        "total_token_throughput": (num_in + num_out) / duration,
        "max_output_tokens_per_s": peak_tokens_per_second(good),
        "max_concurrent_requests": peak_concurrency(good),
    }
    for name, values in series.items():
        milliseconds = np.asarray(values or [0.0]) * 1000
        figures[f"mean_{name}_ms"] = float(milliseconds.mean())
        figures[f"median_{name}_ms"] = float(np.median(milliseconds))
        figures[f"std_{name}_ms"] = float(milliseconds.std())
        for p in percentiles:
            figures[f"p{p:g}_{name}_ms"] = float(np.percentile(milliseconds, p))
    return figures


def is_good(result: RequestResult, goodput: Mapping[str, float]) -> bool:
    seconds = {"ttft": result.ttft, "tpot": result.tpot, "e2el": result.latency}
    return all(seconds[name] * 1000 <= limit for name, limit in goodput.items())


def peak_concurrency(results: Sequence[RequestResult]) -> int:
    """Most requests in flight at once; one that ends as another starts does not overlap it."""
    marks = [(r.start_time, 1) for r in results]
    marks += [(r.start_time + r.latency, -1) for r in results]
    running = peak = 0
    for _, change in sorted(marks):
        running += change
        peak = max(peak, running)
    return peak


def peak_tokens_per_second(results: Sequence[RequestResult]) -> float:
    """Most tokens in one whole second, counted from the first request."""
    if not results:
        return 0.0
    origin = min(result.start_time for result in results)
    counts: dict[int, int] = {}
    for result in results:
        moment = result.start_time + result.ttft
        for gap in (0.0, *result.itl):
            moment += gap
            counts[int(moment - origin)] = counts.get(int(moment - origin), 0) + 1
    return float(max(counts.values()))


def percentile_table(values: Sequence[float]) -> dict[int, float]:
    """As vLLM's offline benchmarks write them."""
    found = np.percentile(np.asarray(values), OFFLINE_PERCENTILES)
    return dict(zip(OFFLINE_PERCENTILES, (float(value) for value in found), strict=True))
