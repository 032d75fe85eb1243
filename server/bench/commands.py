"""`jengine bench ...`: flags, tables and JSON files."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jengine.server.cli_options import EngineFlags
from jengine.server.flag_groups import takes

if TYPE_CHECKING:
    from jengine.server.bench.prompts import Sample
    from jengine.server.bench.serve import ServeOptions

bench = typer.Typer(help="Benchmarks, with vLLM's flags and figures.", no_args_is_help=True)
console = Console()
err = Console(stderr=True)
OutputJson = Annotated[Path | None, typer.Option("--output-json", help="Write figures here.")]


@bench.command()
@takes(EngineFlags)
def latency(
    engine: EngineFlags,
    input_len: Annotated[int, typer.Option()] = 32,
    output_len: Annotated[int, typer.Option()] = 128,
    batch_size: Annotated[int, typer.Option()] = 8,
    n: Annotated[int, typer.Option(help="Completions of each prompt.")] = 1,
    num_iters_warmup: Annotated[int, typer.Option()] = 10,
    num_iters: Annotated[int, typer.Option()] = 30,
    disable_detokenize: Annotated[bool, typer.Option("--disable-detokenize")] = False,
    output_json: OutputJson = None,
) -> None:
    """Time of one batch from the first prompt token to the last output token."""
    from jengine.server.bench import offline

    options = offline.LatencyOptions(
        input_len, output_len, batch_size, n, num_iters_warmup, num_iters, not disable_detokenize
    )
    result = asyncio.run(offline.latency(engine.build(), options, err.print))
    rows = {"Avg latency": f"{result['avg_latency']:.4f} s"}
    rows |= {f"{p}% percentile latency": f"{v:.4f} s" for p, v in result["percentiles"].items()}
    per_second = batch_size * n * output_len / result["avg_latency"]
    rows["Output tokens per second"] = f"{per_second:.1f}"
    _finish("Latency", rows, result, output_json)


@bench.command()
@takes(EngineFlags)
def throughput(
    engine: EngineFlags,
    dataset_name: Annotated[str, typer.Option(help="random, sharegpt or custom.")] = "random",
    dataset_path: Annotated[Path | None, typer.Option()] = None,
    input_len: Annotated[int, typer.Option("--input-len", "--random-input-len")] = 1024,
    output_len: Annotated[int, typer.Option("--output-len", "--random-output-len")] = 128,
    random_range_ratio: Annotated[float, typer.Option()] = 0.0,
    num_prompts: Annotated[int, typer.Option()] = 1000,
    disable_detokenize: Annotated[bool, typer.Option("--disable-detokenize")] = False,
    output_json: OutputJson = None,
) -> None:
    """Requests and tokens per second with all requests there at once."""
    from jengine.server.bench import offline, prompts

    config = engine.build()
    shape = prompts.RandomShape(input_len, output_len, random_range_ratio)

    def make(vocab_size: int) -> Sequence[Sample]:
        if dataset_name == "random":
            return prompts.random_samples(num_prompts, shape, vocab_size, config.model.seed)
        if dataset_path is None:
            raise typer.BadParameter(f"--dataset-name {dataset_name} needs --dataset-path")
        return prompts.file_samples(dataset_name, dataset_path, num_prompts, output_len)

    result = asyncio.run(offline.throughput(config, make, detokenize=not disable_detokenize))
    rows = {
        "Requests": str(result["num_requests"]),
        "Elapsed": f"{result['elapsed_time']:.2f} s",
        "Requests per second": f"{result['requests_per_second']:.2f}",
        "Total tokens per second": f"{result['tokens_per_second']:.2f}",
        "Output tokens per second": f"{result['output_tokens_per_second']:.2f}",
    }
    _finish("Throughput", rows, result, output_json)


@bench.command()
@takes(EngineFlags)
def startup(
    engine: EngineFlags,
    num_iters_cold: Annotated[int, typer.Option()] = 3,
    num_iters_warmup: Annotated[int, typer.Option()] = 1,
    num_iters_warm: Annotated[int, typer.Option()] = 3,
    output_json: OutputJson = None,
) -> None:
    """Time until an engine is ready, with and without kept executables."""
    from jengine.server.bench import offline

    result = asyncio.run(
        offline.startup(
            engine.build(),
            num_cold=num_iters_cold,
            num_warmup=num_iters_warmup,
            num_warm=num_iters_warm,
            report=err.print,
        )
    )
    rows = {key: f"{value:.2f} s" for key, value in result.items() if key.startswith("avg_")}
    for kind in ("cold", "warm"):
        for name, seconds in result.get(f"{kind}_phases", {}).items():
            rows[f"{kind}: {name}"] = f"{seconds:.2f} s"
        if f"{kind}_num_compiled" in result:
            rows[f"{kind}: executables compiled"] = str(result[f"{kind}_num_compiled"])
    _finish("Startup", rows, result, output_json)


@dataclass(frozen=True)
class LoadFlags:
    """Flags of `vllm bench serve`."""

    model: Annotated[str | None, typer.Option(help="Default: the first that is served.")] = None
    backend: Annotated[
        str, typer.Option("--backend", "--endpoint-type", help="openai, openai-chat, jengine-grpc.")
    ] = "openai"
    base_url: Annotated[str | None, typer.Option(help="Instead of --host and --port.")] = None
    host: Annotated[str, typer.Option()] = "127.0.0.1"
    port: Annotated[int, typer.Option()] = 8000
    grpc_port: Annotated[int, typer.Option()] = 50051
    dataset_name: Annotated[str, typer.Option(help="random, sharegpt or custom.")] = "random"
    dataset_path: Annotated[Path | None, typer.Option()] = None
    random_input_len: Annotated[int, typer.Option()] = 1024
    random_output_len: Annotated[int, typer.Option()] = 128
    random_range_ratio: Annotated[float, typer.Option()] = 0.0
    random_prefix_len: Annotated[int, typer.Option()] = 0
    vocab_size: Annotated[int, typer.Option(help="Random ids are below it.")] = 10000
    num_prompts: Annotated[int, typer.Option()] = 1000
    request_rate: Annotated[float, typer.Option(help="Per second; inf: all at once.")] = math.inf
    burstiness: Annotated[float, typer.Option()] = 1.0
    max_concurrency: Annotated[int | None, typer.Option()] = None
    num_warmups: Annotated[int, typer.Option()] = 0
    seed: Annotated[int, typer.Option()] = 0
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos/--no-ignore-eos")] = True
    temperature: Annotated[float, typer.Option()] = 0.0
    percentile_metrics: Annotated[str, typer.Option()] = "ttft,tpot,itl"
    metric_percentiles: Annotated[str, typer.Option()] = "99"
    goodput: Annotated[
        list[str] | None, typer.Option(help="ttft:200, tpot:20 or e2el:2000 (ms); repeatable.")
    ] = None
    api_key: Annotated[str | None, typer.Option()] = None
    save_result: Annotated[bool, typer.Option("--save-result")] = False
    result_dir: Annotated[Path, typer.Option()] = Path()
    result_filename: Annotated[str | None, typer.Option()] = None
    ready_check_timeout_sec: Annotated[float, typer.Option()] = 600.0

    @property
    def url(self) -> str:
        return self.base_url or f"http://{self.host}:{self.port}"

    def samples(self) -> Sequence[Sample]:
        from jengine.server.bench import prompts

        if self.dataset_name == "random":
            if self.backend == "openai-chat":
                raise typer.BadParameter("openai-chat takes text: --dataset-name sharegpt, custom")
            shape = prompts.RandomShape(
                self.random_input_len,
                self.random_output_len,
                self.random_range_ratio,
                self.random_prefix_len,
            )
            return prompts.random_samples(self.num_prompts, shape, self.vocab_size, self.seed)
        if self.dataset_path is None:
            raise typer.BadParameter(f"--dataset-name {self.dataset_name} needs --dataset-path")
        return prompts.file_samples(self.dataset_name, self.dataset_path, self.num_prompts, None)

    def options(self, model: str) -> ServeOptions:
        from jengine.server.bench.serve import ServeOptions

        return ServeOptions(
            backend=self.backend,
            base_url=self.url,
            target=f"{self.host}:{self.grpc_port}",
            model=model,
            request_rate=self.request_rate,
            burstiness=self.burstiness,
            max_concurrency=self.max_concurrency,
            num_warmups=self.num_warmups,
            ready_check_timeout=self.ready_check_timeout_sec,
            temperature=self.temperature,
            ignore_eos=self.ignore_eos,
            seed=self.seed,
            percentiles=tuple(float(p) for p in self.metric_percentiles.split(",")),
            goodput=_goodput(self.goodput or ()),
            api_key=self.api_key,
        )


@bench.command()
@takes(LoadFlags)
def serve(flags: LoadFlags) -> None:
    """Load on a running server: TTFT, TPOT, inter-token and end-to-end latency, throughput."""
    from jengine.server.bench import serve as load

    samples = flags.samples()
    model = flags.model or asyncio.run(_first_model(flags.url, flags.api_key))
    options = flags.options(model)
    result = asyncio.run(load.run(samples, options))
    rows = _serving_rows(result, flags.percentile_metrics.split(","), options.percentiles)
    name = flags.result_filename or f"{flags.backend}-{result['date']}.json"
    _finish("Serving", rows, result, flags.result_dir / name if flags.save_result else None)


async def _first_model(url: str, api_key: str | None) -> str:
    from jengine.server.bench.http_client import Endpoint

    headers = {"authorization": f"Bearer {api_key}"} if api_key else None
    return (await Endpoint.parse(url, headers).get_json("/v1/models"))["data"][0]["id"]


def _goodput(words: Sequence[str]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition(":")
        if name not in ("ttft", "tpot", "e2el") or not value:
            raise typer.BadParameter(f"--goodput {word}: write ttft:MS, tpot:MS or e2el:MS")
        limits[name] = float(value)
    return limits


def _serving_rows(
    result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]
) -> dict[str, str]:
    from jengine.server.bench.stats import TITLES

    rows = {
        "Successful requests": str(result["completed"]),
        "Failed requests": str(result["failed"]),
        "Benchmark duration (s)": f"{result['duration']:.2f}",
        "Total input tokens": str(result["total_input_tokens"]),
        "Total generated tokens": str(result["total_output_tokens"]),
        "Request throughput (req/s)": f"{result['request_throughput']:.2f}",
        "Output token throughput (tok/s)": f"{result['output_throughput']:.2f}",
        "Peak output token throughput (tok/s)": f"{result['max_output_tokens_per_s']:.2f}",
        "Peak concurrent requests": str(result["max_concurrent_requests"]),
        "Total token throughput (tok/s)": f"{result['total_token_throughput']:.2f}",
    }
    if result["request_goodput"] is not None:
        rows["Request goodput (req/s)"] = f"{result['request_goodput']:.2f}"
    for metric in metrics:
        rows[f"-- {TITLES[metric]}"] = ""
        for kind in ("mean", "median", *(f"p{p:g}" for p in percentiles)):
            rows[f"{kind.title()} {metric.upper()} (ms)"] = f"{result[f'{kind}_{metric}_ms']:.2f}"
    return rows


def _finish(
    title: str, rows: Mapping[str, str], result: Mapping[str, Any], path: Path | None
) -> None:
    table = Table(title=f"{title} benchmark", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=4) + "\n", encoding="utf-8")
