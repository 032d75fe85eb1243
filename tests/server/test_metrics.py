"""/metrics: vLLM's names and labels, and figures that add up."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from prometheus_client import parser
from prometheus_client.core import Metric

from jengine.client import Client
from jengine.protocol import EngineStats
from jengine.server.metrics import ServerMetrics, ThroughputMeter, length_buckets
from tests.server.harness import MODEL_NAME, RunningServer, echo_server, get, post

ENGINE = {"model_name", "engine"}
# Names that dashboards and routers ask for (vLLM 0.22), and the labels besides model_name and
# engine.
GAUGES = {
    "vllm:num_requests_running": set(),
    "vllm:num_requests_waiting": set(),
    "vllm:num_requests_waiting_by_reason": {"reason"},
    "vllm:kv_cache_usage_perc": set(),
    "vllm:engine_sleep_state": {"sleep_state"},
    "vllm:cache_config_info": {
        "block_size",
        "num_gpu_blocks",
        "cache_dtype",
        "enable_prefix_caching",
        "gpu_memory_utilization",
    },
}
COUNTERS = {
    "vllm:prefix_cache_queries": set(),
    "vllm:prefix_cache_hits": set(),
    "vllm:num_preemptions": set(),
    "vllm:prompt_tokens": set(),
    "vllm:prompt_tokens_cached": set(),
    "vllm:prompt_tokens_by_source": {"source"},
    "vllm:generation_tokens": set(),
    "vllm:request_success": {"finished_reason"},
}
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "request_prefill_kv_computed_tokens",
)


@pytest.fixture
def fresh(echo_model: Path) -> Iterator[RunningServer]:
    """Counters start at zero (the warm-up request is not one)."""
    with echo_server(echo_model) as running:
        yield running


class Scrape:
    def __init__(self, server: RunningServer) -> None:
        status, text = get(server.http + "/metrics")
        assert status == 200
        self.families = {family.name: family for family in _parse(text)}
        self.samples: dict[tuple[str, ...], float] = {
            (sample.name, *(v for k, v in sorted(sample.labels.items()) if k not in ENGINE)): (
                sample.value
            )
            for family in self.families.values()
            for sample in family.samples
        }

    def __getitem__(self, key: str | tuple[str, ...]) -> float:
        return self.samples[(key,) if isinstance(key, str) else key]


def test_names_kinds_and_labels(server: RunningServer) -> None:
    families = Scrape(server).families
    expected = {name: ("gauge", labels) for name, labels in GAUGES.items()}
    expected |= {name: ("counter", labels) for name, labels in COUNTERS.items()}
    expected |= {f"vllm:{name}": ("histogram", {"le"}) for name in HISTOGRAMS}
    for name, (kind, labels) in expected.items():
        assert families[name].type == kind, name
        sample = families[name].samples[0]
        assert set(sample.labels) == ENGINE | labels, name
        assert sample.labels["model_name"] == MODEL_NAME


def test_figures_add_up(fresh: RunningServer) -> None:
    for n in (1, 2):
        body = {"prompt": "abc", "max_tokens": 6, "n": n, "temperature": 1.0}
        assert post(fresh.http + "/v1/completions", body)[0] == 200
    with Client(fresh.grpc) as client:
        list(client.generate("abcd", temperature=0, stop="d", max_tokens=9))
    assert post(fresh.http + "/v1/completions", {"prompt": ""})[0] == 400
    scrape = Scrape(fresh)
    assert scrape["vllm:request_success_total", "length"] == 3
    assert scrape["vllm:request_success_total", "stop"] == 1
    assert scrape["vllm:request_success_total", "abort"] == 0
    assert scrape["vllm:request_prompt_tokens_sum"] == 3 * 3 + 4
    assert scrape["vllm:request_generation_tokens_sum"] == 3 * 6 + 4
    assert scrape["vllm:time_to_first_token_seconds_count"] == 4
    assert scrape["vllm:request_params_n_sum"] == 1 + 2 + 1 + 1
    assert scrape["vllm:request_params_max_tokens_sum"] == 6 + 6 + 9 + 16
    assert scrape["vllm:request_prefill_kv_computed_tokens_sum"] == 1  # the echo core caches three
    assert scrape["jengine:requests_rejected_total", "InvalidRequestError"] == 1
    assert scrape["http_requests_total", "/v1/completions", "POST", "2xx"] == 2
    assert scrape["http_requests_total", "/v1/completions", "POST", "4xx"] == 1


def test_made_up_paths_make_one_series(fresh: RunningServer) -> None:
    for i in range(5):
        get(f"{fresh.http}/made/up/{i}")
    handlers = {key[1] for key in Scrape(fresh).samples if key[0] == "http_requests_total"}
    assert handlers <= {"none", "/health"}


def test_engine_snapshot_becomes_series() -> None:
    from jengine.config import CacheConfig

    metrics = ServerMetrics("m")
    stats = EngineStats(
        num_running=2, num_waiting=3, num_pages_used=5, num_pages_total=20, prefix_hits=30
    )
    stats.num_compiling = 4
    stats.num_prompt_tokens = 100
    metrics.watch_engine(lambda: stats, CacheConfig())
    values = {
        (sample.name, *(v for k, v in sample.labels.items() if k not in ENGINE)): sample.value
        for family in _parse(metrics.render().decode())
        for sample in family.samples
    }
    assert values["vllm:kv_cache_usage_perc",] == 0.25
    assert values["vllm:num_requests_waiting_by_reason", "capacity"] == 3
    assert values["jengine:executables_compiling",] == 4
    assert values["vllm:prompt_tokens_by_source_total", "local_compute"] == 70
    assert values["vllm:prompt_tokens_by_source_total", "local_cache_hit"] == 30
    stats.num_running = 7
    assert "vllm:num_requests_running" in metrics.render().decode()


def test_length_buckets() -> None:
    assert length_buckets(300) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert length_buckets(1) == [1]


def test_throughput_meter_approaches_the_rate() -> None:
    meter = ThroughputMeter()
    for second in range(60):
        meter.sample(float(second), second * 50)
    assert meter.tokens_per_second == pytest.approx(50, rel=1e-3)
    meter.sample(59.0, 10**6)  # no time has passed
    assert meter.tokens_per_second == pytest.approx(50, rel=1e-3)


def _parse(text: str) -> Iterable[Metric]:
    return parser.text_string_to_metric_families(text)
