"""`jengine bench serve`: load on a running server, with the meaning and the figures of `vllm bench
serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec
import numpy as np

from jengine.client import AsyncClient
from jengine.errors import JengineError
from jengine.server.bench.http_client import Endpoint, HttpError
from jengine.server.bench.prompts import Sample
from jengine.server.bench.stats import RequestResult, serving_figures

READY_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Flags of `vllm bench serve` that are not about the data set."""

    backend: str  # openai (completions), openai-chat, jengine-grpc
    base_url: str
    target: str  # gRPC
    model: str
    request_rate: float = float("inf")
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 0
    ready_check_timeout: float = 600.0
    temperature: float = 0.0
    ignore_eos: bool = True
    seed: int = 0
    percentiles: tuple[float, ...] = (99.0,)
    goodput: dict[str, float] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    api_key: str | None = None


Send = Callable[[Sample], AsyncIterator[tuple[int, str, int | None]]]  # (new tokens, text, prompt)


async def run(samples: Sequence[Sample], options: ServeOptions) -> dict[str, Any]:
    """Returns vLLM's result dictionary."""
    async with _sender(options) as send:
        await _wait_until_ready(send, samples[0], options.ready_check_timeout)
        await asyncio.gather(*(measure(send, samples[0]) for _ in range(options.num_warmups)))
        gate: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()
        if options.max_concurrency is not None:
            gate = asyncio.Semaphore(options.max_concurrency)

        async def one(sample: Sample) -> RequestResult:
            async with gate:
                return await measure(send, sample)

        delays = arrival_delays(
            len(samples), options.request_rate, options.burstiness, options.seed
        )
        started = time.perf_counter()
        tasks = []
        for sample, delay in zip(samples, delays, strict=True):
            if (pause := started + delay - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            tasks.append(asyncio.create_task(one(sample)))
        results = await asyncio.gather(*tasks)
        duration = time.perf_counter() - started
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": None,
        "model_id": options.model,
        "tokenizer_id": options.model,
        "num_prompts": len(samples),
        "request_rate": "inf" if options.request_rate == float("inf") else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        **serving_figures(results, duration, options.percentiles, options.goodput),
        **_details(results),
    }


async def measure(send: Send, sample: Sample) -> RequestResult:
    """Time one request; a failure is part of the result."""
    result = RequestResult(sample.prompt_len, start_time=time.perf_counter())
    last = result.start_time
    pieces: list[str] = []
    try:
        async for num_tokens, text, num_prompt in send(sample):
            now = time.perf_counter()
            if num_prompt is not None:
                result.prompt_len = num_prompt
            if num_tokens:
                if result.output_tokens == 0:
                    result.ttft = now - result.start_time
                else:
                    result.itl.append(now - last)
                result.output_tokens += num_tokens
                result.latency = now - result.start_time
                last = now
            pieces.append(text)
    except (OSError, EOFError, ValueError, HttpError, JengineError) as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    result.success = result.output_tokens > 0
    result.error = "" if result.success else "no tokens came"
    result.generated_text = "".join(pieces)
    return result


def arrival_delays(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start. Gaps follow a gamma distribution (burstiness 1: a Poisson process),
    scaled so that the last request leaves at count / rate: seeds then differ in pattern, not in
    load.
    """
    if rate == float("inf"):
        return [0.0] * count
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(shape=burstiness, scale=1.0 / (rate * burstiness), size=count)
    moments = np.cumsum(gaps)
    return [float(moment) for moment in moments * (count / rate / moments[-1])]


@contextlib.asynccontextmanager
async def _sender(options: ServeOptions) -> AsyncIterator[Send]:
    if options.backend == "jengine-grpc":
        async with AsyncClient(options.target, api_key=options.api_key) as client:
            yield _grpc_sender(client, options)
        return
    headers = dict(options.headers)
    if options.api_key:
        headers["authorization"] = f"Bearer {options.api_key}"
    endpoint = Endpoint.parse(options.base_url, headers)
    chat = options.backend == "openai-chat"
    yield _http_sender(endpoint, options, chat=chat)


def _grpc_sender(client: AsyncClient, options: ServeOptions) -> Send:
    async def send(sample: Sample) -> AsyncIterator[tuple[int, str, int | None]]:
        stream = client.generate(
            sample.prompt,
            max_tokens=sample.output_len,
            temperature=options.temperature,
            ignore_eos=options.ignore_eos,
        )
        async for delta in stream:
            num_prompt = delta.prompt.num_tokens if delta.prompt else None
            yield len(delta.token_ids), delta.text, num_prompt

    return send


def _http_sender(endpoint: Endpoint, options: ServeOptions, *, chat: bool) -> Send:
    """Tokens are counted from usage in every chunk where the server knows it (jengine, vLLM), else
    one a chunk.
    """

    async def send(sample: Sample) -> AsyncIterator[tuple[int, str, int | None]]:
        body: dict[str, Any] = {
            "model": options.model,
            "temperature": options.temperature,
            "max_tokens": sample.output_len,
            "ignore_eos": options.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if chat:
            body["messages"] = [{"role": "user", "content": sample.prompt}]
        else:
            body["prompt"] = sample.prompt
        seen = 0
        path = "/v1/chat/completions" if chat else "/v1/completions"
        async for data in endpoint.stream(path, body):
            chunk = msgspec.json.decode(data)
            if "error" in chunk:
                raise ValueError(chunk["error"])
            usage = chunk.get("usage") or {}
            text = _text_of(chunk, chat=chat)
            total = usage.get("completion_tokens", seen + bool(text))
            yield total - seen, text, usage.get("prompt_tokens")
            seen = total

    return send


def _text_of(chunk: dict[str, Any], *, chat: bool) -> str:
    if not chunk["choices"]:
        return ""
    choice = chunk["choices"][0]
    return (choice["delta"].get("content") if chat else choice["text"]) or ""


async def _wait_until_ready(send: Send, sample: Sample, timeout: float) -> None:
    """vLLM's initial test run: repeated until it works."""
    until = time.perf_counter() + timeout
    while timeout > 0:
        result = await measure(send, Sample(sample.prompt, sample.prompt_len, sample.output_len))
        if result.success:
            return
        if time.perf_counter() > until or "HTTP 4" in result.error:
            raise JengineError(f"the initial test request failed: {result.error}")
        await asyncio.sleep(READY_POLL_SECONDS)


def _details(results: Sequence[RequestResult]) -> dict[str, Any]:
    return {
        "input_lens": [r.prompt_len for r in results],
        "output_lens": [r.output_tokens for r in results],
        "ttfts": [r.ttft for r in results],
        "itls": [r.itl for r in results],
        "start_times": [r.start_time for r in results],
        "generated_texts": [r.generated_text for r in results],
        "errors": [r.error for r in results],
    }
