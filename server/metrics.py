"""Prometheus metrics under vLLM's names, so that its dashboards and routers read us unchanged; ours
beside them.

Load and totals come from the engine's own snapshot when scraped; only what the front end alone can
see (latencies of requests) is observed as it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jengine.config import CacheConfig

if TYPE_CHECKING:
    from jengine.protocol import EngineStats

ENGINE_LABELS = ("model_name", "engine")
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")

_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_HTTP_BUCKETS = (0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 10.0, 60.0)


class ServerMetrics:
    """All series of one process, in a registry of its own (tests start many servers in one
    process).
    """

    def __init__(self, model_name: str, max_model_len: int = 131072) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        sizes = length_buckets(max_model_len)
        seconds = _REQUEST_BUCKETS
        h = self._histogram
        self.time_to_first_token = h(
            "time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS
        )
        self.inter_token_latency = h(
            "inter_token_latency_seconds",
            "Time between tokens of streamed requests.",
            _TOKEN_BUCKETS,
        )
        self.time_per_output_token = h(
            "request_time_per_output_token_seconds",
            "Mean time per token after the first.",
            _TOKEN_BUCKETS,
        )
        self.e2e_latency = h("e2e_request_latency_seconds", "Arrival to last token.", seconds)
        self.queue_time = h("request_queue_time_seconds", "Arrival to first step.", seconds)
        self.inference_time = h(
            "request_inference_time_seconds", "First step to last token.", seconds
        )
        self.prefill_time = h("request_prefill_time_seconds", "First step to first token.", seconds)
        self.decode_time = h("request_decode_time_seconds", "First to last token.", seconds)
        self.prompt_tokens = h("request_prompt_tokens", "Prompt length.", sizes)
        self.generation_tokens = h("request_generation_tokens", "Generated tokens.", sizes)
        self.max_generation_tokens = h(
            "request_max_num_generation_tokens", "Longest completion of a request.", sizes
        )
        self.params_max_tokens = h("request_params_max_tokens", "max_tokens asked for.", sizes)
        self.prefill_computed_tokens = h(
            "request_prefill_kv_computed_tokens", "Prompt tokens not served from the cache.", sizes
        )
        self.params_n = h("request_params_n", "n asked for.", (1, 2, 5, 10, 20))
        self.success = Counter(
            "vllm:request_success",
            "Finished completions.",
            (*ENGINE_LABELS, "finished_reason"),
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error", "repetition"):
            self.success.labels(**self._labels, finished_reason=reason)
        self.rejected = Counter(
            "jengine:requests_rejected",
            "Requests refused before they ran.",
            (*ENGINE_LABELS, "error"),
            registry=self.registry,
        )
        self.cancelled = Counter(
            "jengine:requests_cancelled",
            "Requests whose client went away.",
            (*ENGINE_LABELS, "endpoint"),
            registry=self.registry,
        )
        self.stalled = Counter(
            "jengine:requests_stalled",
            "Requests ended because their client read nothing.",
            (*ENGINE_LABELS, "endpoint"),
            registry=self.registry,
        )
        self.http_requests = Counter(
            "http_requests",
            "HTTP requests.",
            ("handler", "method", "status"),
            registry=self.registry,
        )
        self.http_duration = Histogram(
            "http_request_duration_seconds",
            "HTTP requests, until the last byte.",
            ("handler", "method"),
            buckets=_HTTP_BUCKETS,
            registry=self.registry,
        )

    def watch_engine(self, stats: Callable[[], EngineStats], cache: CacheConfig) -> None:
        """Report the engine's snapshots from now on."""
        self.registry.register(EngineCollector(stats, cache, self._labels))

    def finished(self, reason: str) -> None:
        self.success.labels(**self._labels, finished_reason=reason).inc()

    def reject(self, error: str) -> None:
        self.rejected.labels(**self._labels, error=error).inc()

    def cancel(self, endpoint: str) -> None:
        self.cancelled.labels(**self._labels, endpoint=endpoint).inc()

    def stall(self, endpoint: str) -> None:
        self.stalled.labels(**self._labels, endpoint=endpoint).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        family = Histogram(
            f"vllm:{name}", text, ENGINE_LABELS, buckets=tuple(buckets), registry=self.registry
        )
        return family.labels(**self._labels)


class EngineCollector(Collector):
    """Turns one `EngineStats` snapshot into series at each scrape."""

    def __init__(
        self, stats: Callable[[], EngineStats], cache: CacheConfig, labels: dict[str, str]
    ) -> None:
        self._stats = stats
        self._cache = cache
        self._names = tuple(labels)
        self._values = tuple(labels.values())

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        usage = stats.num_pages_used / stats.num_pages_total if stats.num_pages_total else 0.0
        yield self._gauge("vllm:num_requests_running", "Requests in steps.", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting.", stats.num_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Pages in use, 0 to 1.", usage)
        yield self._gauge(
            "vllm:num_requests_waiting_by_reason",
            "Requests waiting.",
            {"capacity": stats.num_waiting, "deferred": 0},
            label="reason",
        )
        yield self._gauge(
            "vllm:engine_sleep_state",
            "Whether the engine sleeps.",
            {state: float(state == "awake") for state in SLEEP_STATES},
            label="sleep_state",
        )
        yield self._cache_info(stats)
        for name, text, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found.", stats.prefix_hits),
            ("vllm:num_preemptions", "Times a request lost its pages.", stats.num_preemptions),
            ("vllm:prompt_tokens", "Prompt tokens processed.", stats.num_prompt_tokens),
            ("vllm:prompt_tokens_cached", "Of them, from the cache.", stats.prefix_hits),
            ("vllm:generation_tokens", "Tokens generated.", stats.num_generation_tokens),
            ("vllm:corrupted_requests", "Ended by NaN in their logits.", stats.num_corrupted),
            ("jengine:steps", "Steps run.", stats.num_steps),
            (
                "jengine:compilations",
                "Compilations that nobody prepared: each is a bug.",
                stats.num_compilations,
            ),
            ("jengine:grammars_compiled", "For structured outputs.", stats.num_grammars),
            ("jengine:grammar_masks", "Tokens of constrained requests.", stats.num_masks),
            ("jengine:grammar_mask_seconds", "Computing those masks.", stats.mask_seconds),
        ):
            yield self._counter(name, text, value)
        computed = max(stats.num_prompt_tokens - stats.prefix_hits, 0)
        yield self._counter(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens by where their KV came from.",
            {"local_compute": computed, "local_cache_hit": stats.prefix_hits},
            label="source",
        )
        yield self._gauge("jengine:step_tokens", "Tokens of the last step.", stats.scheduled_tokens)
        yield self._gauge("jengine:step_bucket_tokens", "Its padded size.", stats.padded_tokens)
        yield self._gauge(
            "jengine:executables_compiling",
            "Executables not ready yet, while larger ones serve.",
            stats.num_compiling,
        )

    def _cache_info(self, stats: EngineStats) -> Metric:
        values = {
            "block_size": stats.page_size,
            "num_gpu_blocks": stats.num_pages_total,
            "cache_dtype": self._cache.kv_cache_dtype,
            "enable_prefix_caching": self._cache.enable_prefix_caching,
            "gpu_memory_utilization": self._cache.gpu_memory_utilization,
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache.", labels=(*self._names, *values)
        )
        family.add_metric((*self._values, *(str(value) for value in values.values())), 1)
        return family

    def _gauge(
        self, name: str, text: str, value: float | dict[str, float], label: str | None = None
    ) -> Metric:
        family = GaugeMetricFamily(name, text, labels=self._label_names(label))
        for extra, number in _series(value):
            family.add_metric((*self._values, *extra), number)
        return family

    def _counter(
        self, name: str, text: str, value: float | dict[str, float], label: str | None = None
    ) -> Metric:
        family = CounterMetricFamily(name, text, labels=self._label_names(label))
        for extra, number in _series(value):
            family.add_metric((*self._values, *extra), number)
        return family

    def _label_names(self, label: str | None) -> tuple[str, ...]:
        return self._names if label is None else (*self._names, label)


class ThroughputMeter:
    """Generated tokens per second between samples, smoothed over about ten of them."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        self.tokens_per_second = 0.0

    def sample(self, now: float, num_generation_tokens: int) -> None:
        if self._last is not None and now > self._last[0]:
            rate = (num_generation_tokens - self._last[1]) / (now - self._last[0])
            self.tokens_per_second += (rate - self.tokens_per_second) * 0.2
        self._last = (now, num_generation_tokens)


def length_buckets(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `limit`."""
    buckets: list[int] = []
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power > limit:
                return buckets
            buckets.append(step * power)
        power *= 10


def _series(value: float | dict[str, float]) -> list[tuple[tuple[str, ...], float]]:
    if isinstance(value, dict):
        return [((label,), number) for label, number in value.items()]
    return [((), value)]
