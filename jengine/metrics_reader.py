"""Engine statistics as `LLM.get_metrics` gives them: vLLM's metric names and classes."""

from dataclasses import dataclass, field

from jengine.protocol import EngineStats


@dataclass(frozen=True, slots=True)
class Metric:
    """One value and the labels of its time series."""

    name: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """Grows from the engine's start on."""


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    """As of the last step."""


def build_metrics(stats: EngineStats, model_name: str) -> list[Metric]:
    labels = {"model_name": model_name, "engine": "0"}
    gauges = {
        "vllm:num_requests_running": stats.num_running,
        "vllm:num_requests_waiting": stats.num_waiting,
        "vllm:kv_cache_usage_perc": stats.num_pages_used / stats.num_pages_total
        if stats.num_pages_total
        else 0.0,
    }
    counters = {
        "vllm:num_preemptions": stats.num_preemptions,
        "vllm:prefix_cache_queries": stats.prefix_queries,
        "vllm:prefix_cache_hits": stats.prefix_hits,
        "vllm:prompt_tokens": stats.num_prompt_tokens,
        "vllm:generation_tokens": stats.num_generation_tokens,
        "vllm:corrupted_requests": stats.num_corrupted,
    }
    return [
        *(Gauge(name, value, labels) for name, value in gauges.items()),
        *(Counter(name, value, labels) for name, value in counters.items()),
    ]
