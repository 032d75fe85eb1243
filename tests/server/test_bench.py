"""Figures of the benchmarks against their definitions, worked out by hand or by numpy."""

import asyncio
import statistics

import numpy as np
import pytest

from jengine.errors import InvalidRequestError
from jengine.server.bench import prompts, stats
from jengine.server.bench.http_client import Endpoint, HttpError
from jengine.server.bench.serve import arrival_delays
from jengine.server.bench.stats import RequestResult, serving_figures
from tests.server.harness import RunningServer


def result(start: float, ttft: float, gaps: list[float]) -> RequestResult:
    return RequestResult(
        prompt_len=10,
        start_time=start,
        success=True,
        latency=ttft + sum(gaps),
        ttft=ttft,
        itl=gaps,
        output_tokens=1 + len(gaps),
    )


def test_serving_figures() -> None:
    good = [result(0.0, 0.1, [0.02, 0.04]), result(0.5, 0.3, [0.05]), result(2.0, 0.2, [])]
    bad = RequestResult(prompt_len=10, error="refused")
    figures = serving_figures([*good, bad], 4.0, (50.0, 99.0), {"ttft": 250.0, "tpot": 60.0})
    assert (figures["completed"], figures["failed"]) == (3, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (30, 6)
    assert figures["request_throughput"] == 0.75
    assert figures["output_throughput"] == 1.5
    assert figures["total_token_throughput"] == 9.0
    assert figures["mean_ttft_ms"] == pytest.approx(200.0)
    assert figures["std_ttft_ms"] == pytest.approx(statistics.pstdev([100, 300, 200]))
    # TPOT: requests with one token have none. 60 / 2 and 50 / 1.
    assert figures["mean_tpot_ms"] == pytest.approx(40.0)
    assert figures["mean_itl_ms"] == pytest.approx((20 + 40 + 50) / 3)
    assert figures["p99_e2el_ms"] == pytest.approx(np.percentile([160, 350, 200], 99))
    assert figures["request_goodput"] == 0.5  # the second one's first token took 300 ms


def test_peaks() -> None:
    runs = [result(0.0, 0.5, [0.5]), result(1.0, 0.5, [0.5]), result(1.2, 0.1, [])]
    assert stats.peak_concurrency(runs) == 2, "the first ends as the second starts"
    # Tokens at 0.5 and 1.0; 1.5 and 2.0; 1.3.
    assert stats.peak_tokens_per_second(runs) == 3
    assert stats.peak_tokens_per_second([]) == 0.0


def test_nothing_succeeded() -> None:
    figures = serving_figures([RequestResult(1, error="x")], 1.0, (99.0,), {})
    assert figures["completed"] == 0
    assert figures["p99_ttft_ms"] == 0.0
    assert figures["request_goodput"] is None


def test_arrivals() -> None:
    assert arrival_delays(3, float("inf"), 1.0, 0) == [0.0, 0.0, 0.0]
    delays = arrival_delays(2000, 50.0, 1.0, seed=1)
    assert delays == sorted(delays)
    assert delays[-1] == pytest.approx(2000 / 50)
    gaps = np.diff(delays)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1), "exponential gaps"
    smooth = np.diff(arrival_delays(2000, 50.0, 100.0, seed=1))
    assert np.std(smooth) < 0.2 * np.mean(smooth)


def test_random_prompts() -> None:
    shape = prompts.RandomShape(input_len=50, output_len=20, range_ratio=0.5, prefix_len=8)
    samples = prompts.random_samples(500, shape, 1000, seed=3)
    assert samples == prompts.random_samples(500, shape, 1000, seed=3)
    assert len({tuple(s.prompt[:8]) for s in samples}) == 1
    lengths = [s.prompt_len - 8 for s in samples]
    assert (min(lengths), max(lengths)) == (25, 75)
    assert {s.output_len for s in samples} == set(range(10, 31))
    assert all(len(s.prompt) == s.prompt_len for s in samples)
    assert all(0 <= i < 1000 for s in samples for i in s.prompt if isinstance(i, int))
    with pytest.raises(InvalidRequestError):
        prompts.random_samples(1, prompts.RandomShape(1, 1, 1.0), 10, 0)


def test_small_http_client(server: RunningServer) -> None:
    async def use() -> None:
        endpoint = Endpoint.parse(server.http + "/")
        assert (await endpoint.get_json("/version"))["version"]
        body = {"prompt": "ab", "max_tokens": 3}
        answer = await endpoint.post_json("/v1/completions", body)
        assert answer["choices"][0]["text"] == "aba"
        chunks = [c async for c in endpoint.stream("/v1/completions", {**body, "stream": True})]
        assert b'"finish_reason":"length"' in chunks[-1]
        with pytest.raises(HttpError, match="HTTP 400"):
            await endpoint.post_json("/v1/completions", {})

    asyncio.run(use())
