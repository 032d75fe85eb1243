"""Flags to configuration; what is ignored, refused, unknown; commands against a server."""

import json
import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jengine.config import EngineConfig
from jengine.server import __main__ as cli
from jengine.server import logs, vllm_flags
from jengine.server.cli_options import EngineFlags
from jengine.server.flag_groups import takes
from jengine.server.server_flags import ServerFlags
from jengine.server.settings import ServerSettings
from tests.oracles.dummy_model import write_dummy_model
from tests.server.harness import RunningServer

REPO = Path(__file__).resolve().parents[2]
runner = CliRunner()


def engine_of(*argv: str) -> tuple[EngineConfig, ServerSettings]:
    app = typer.Typer()
    box: list[tuple[EngineFlags, ServerFlags]] = []

    @app.command()
    @takes(EngineFlags, ServerFlags)
    def command(engine: EngineFlags, server: ServerFlags) -> None:
        box.append((engine, server))

    result = runner.invoke(app, list(argv))
    assert result.exit_code == 0, result.output
    engine, server = box[0]
    return engine.build(), server.build()


def test_nothing_given_is_the_engine_s_defaults() -> None:
    assert engine_of("m") == (EngineConfig.from_kwargs("m"), ServerSettings())


def test_vllm_spellings(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \n")
    config, settings = engine_of(
        *("--model", "m", "--dtype", "float32", "--max-model-len", "128", "--block-size", "32"),
        *("--served-model-name", "a", "--served-model-name", "b", "--max-num-seqs", "4"),
        *("--no-enable-prefix-caching", "--num-gpu-blocks-override", "77"),
        *("--scheduling-policy", "priority", "--hf-overrides", '{"x": 1}', "--seed", "5"),
        *("--compile-cache-dir", str(tmp_path), "--no-async-scheduling"),
        *("--api-key", "zero", "--api-key-file", str(keys), "--no-grpc", "--port", "1"),
        *("--disable-log-requests", "--uvicorn-log-level", "debug", "--shutdown-timeout", "3"),
        *("--max-decode-steps", "4", "--enable-auto-tool-choice"),
        *("--tool-call-parser", "deepseek_v4", "--reasoning-parser", "deepseek_v4"),
    )
    assert config.model.served_model_name == ("a", "b")
    assert (config.model.dtype, config.model.max_model_len) == ("float32", 128)
    assert config.model.hf_overrides == {"x": 1}
    assert config.model.seed == 5
    assert (config.cache.page_size, config.cache.num_pages) == (32, 77)
    assert not config.cache.enable_prefix_caching
    assert (config.scheduler.max_num_seqs, config.scheduler.policy) == (4, "priority")
    assert not config.scheduler.async_scheduling
    assert config.scheduler.max_decode_steps == 4
    assert config.compile.cache_dir == str(tmp_path)
    assert settings.api_keys == ("zero", "one", "two")
    assert (settings.port, settings.grpc_port, settings.shutdown_timeout) == (1, None, 3.0)
    assert not settings.log_requests
    assert settings.enable_auto_tool_choice
    assert settings.tool_call_parser == settings.reasoning_parser == "deepseek_v4"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve"], "name one model"),
        (["serve", "a", "--model", "b"], "name one model"),
        (["serve", "m", "-dp", "0"], "data_parallel_size must be >= 1"),
        (["serve", "m", "-tp", "0"], "tensor_parallel_size must be >= 1"),
        (["serve", "m", "-tp", "4", "--expert-parallel-size", "2"], "needs enable_expert_parallel"),
        (
            ["serve", "m", "-tp", "4", "--enable-expert-parallel", "--expert-parallel-size", "3"],
            "must divide",
        ),
        (["serve", "m", "--hf-overrides", "{"], "not JSON"),
        (["serve", "m", "--max-num-seqs", "many"], "--max-num-seqs"),
        (["serve", "m", "--max-decode-steps", "0"], "max_decode_steps must be >= 1"),
        (["serve", "m", "--no-grpc", "--no-http"], "nothing to serve"),
        (["serve", "m", "--ssl-keyfile", "k"], "go together"),
        (["serve", "m", "--reasoning-parser", "qwen3"], "must be one of deepseek_v4, got 'qwen3'"),
        (["serve", "m", "--enable-auto-tool-choice"], "needs --tool-call-parser"),
        (["serve", "m", "--no-such-flag"], "No such option"),
        (["bench", "serve", "--dataset-name", "sharegpt", "--model", "m"], "dataset-path"),
        (["bench", "serve", "--goodput", "fast", "--model", "m"], "ttft:MS"),
    ],
)
def test_bad_flags(argv: list[str], message: str) -> None:
    result = runner.invoke(cli.app, argv, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output


def test_vllm_flags_that_mean_nothing_here() -> None:
    argv = ["m", "--enforce-eager", "--swap-space", "4", "--download-dir=/x", "--port", "1"]
    argv += ["--trust_remote_code", "-O", "3", "-pp", "3", "--max_num_seqs", "2"]
    kept, dropped, refused = vllm_flags.split(argv)
    assert kept == ["m", "--port", "1", "3", "--max-num-seqs", "2"]
    assert dropped == [
        "--enforce-eager",
        "--swap-space",
        "--download-dir",
        "--trust-remote-code",
        "-O",
    ]
    assert refused == ["-pp"]


def test_no_flag_of_ours_is_ignored_or_refused() -> None:
    serve = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    ours = {
        name for parameter in serve.params for name in parameter.opts + parameter.secondary_opts
    }
    assert "--max-num-seqs" in ours
    assert not ours & (set(vllm_flags.IGNORED) | vllm_flags.UNSUPPORTED)


def test_main_turns_errors_into_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["jengine", "pull", "no-such-model"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "no-such-model" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["jengine", "serve", "m", "--enable-lora"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2


def test_generate_and_chat_over_grpc(server: RunningServer) -> None:
    argv = ["--target", server.grpc, "--temperature", "0", "--max-tokens", "6"]
    result = runner.invoke(cli.app, ["generate", "-p", "ab", "-p", "xyz", *argv])
    assert result.output == "abababab\nxyzxyzxyz\n"
    result = runner.invoke(cli.app, ["chat", "-q", "hi", *argv])
    assert result.output == "[user]\n"
    result = runner.invoke(cli.app, ["chat", *argv], input="one\ntwo\n")
    assert result.output.count("[user]") == 2


def test_bench_serve(server: RunningServer, tmp_path: Path) -> None:
    port, grpc_port = str(server.app.http_port), str(server.app.grpc_port)
    common = ["bench", "serve", "--port", port, "--grpc-port", grpc_port, "--num-prompts", "8"]
    common += ["--random-input-len", "20", "--random-output-len", "10", "--vocab-size", "256"]
    common += ["--save-result", "--result-dir", str(tmp_path), "--goodput", "e2el:60000"]
    for backend in ("openai", "jengine-grpc"):
        argv = [*common, "--backend", backend, "--result-filename", f"{backend}.json"]
        result = runner.invoke(cli.app, argv)
        assert result.exit_code == 0, result.output
        figures = json.loads((tmp_path / f"{backend}.json").read_text())
        assert (figures["completed"], figures["failed"]) == (8, 0)
        assert figures["total_input_tokens"] == 160
        assert figures["total_output_tokens"] == 80
        assert figures["output_lens"] == [10] * 8
        assert figures["request_goodput"] == figures["request_throughput"]
        assert figures["model_id"] == "echo"
        assert 0 < figures["median_ttft_ms"] <= figures["p99_ttft_ms"]


def test_bench_serve_counts_failures(server: RunningServer, tmp_path: Path) -> None:
    rows = [{"prompt": "abc", "output_tokens": 5}, {"prompt": "", "output_tokens": 5}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    argv = ["bench", "serve", "--port", str(server.app.http_port), "--num-prompts", "4"]
    argv += ["--dataset-name", "custom", "--dataset-path", str(path), "--request-rate", "100"]
    argv += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
    assert runner.invoke(cli.app, argv).exit_code == 0
    figures = json.loads((tmp_path / "r.json").read_text())
    assert (figures["completed"], figures["failed"]) == (2, 2)
    assert "HTTP 400" in figures["errors"][1]


def test_collect_env(tmp_path: Path) -> None:
    path = tmp_path / "env.json"
    result = runner.invoke(cli.app, ["collect-env", "--output-json", str(path)])
    assert result.exit_code == 0
    report = json.loads(path.read_text())
    assert report["devices"]
    assert report["jax"] == metadata.version("jax")


@pytest.fixture
def tiny_flags(tmp_path: Path) -> list[str]:
    """A model of one layer and four step shapes, with a cache of its own."""
    model = write_dummy_model(tmp_path / "model", num_hidden_layers=1)
    flags = [str(model), "--load-format", "dummy", "--skip-tokenizer-init"]
    flags += ["--max-num-seqs", "2", "--max-num-batched-tokens", "8", "--max-model-len", "64"]
    flags += ["--num-gpu-blocks-override", "12", "--compile-cache-dir", str(tmp_path / "cache")]
    return flags


def test_prebuild_then_a_start_compiles_nothing(tiny_flags: list[str], tmp_path: Path) -> None:
    # In a process of its own: this one has eight devices, which is another key.
    command = [sys.executable, "-m", "jengine.server", "prebuild", *tiny_flags]
    built = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "7 executables (7 compiled" in built.stdout
    again = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert "7 executables (0 compiled" in again.stdout
    assert "was there" in again.stdout

    figures = tmp_path / "figures.json"
    argv = ["bench", "startup", *tiny_flags, "--num-iters-cold", "0", "--num-iters-warmup", "0"]
    argv += ["--num-iters-warm", "1", "--output-json", str(figures)]
    result = runner.invoke(cli.app, argv)
    assert result.exit_code == 0, result.output
    start = json.loads(figures.read_text())
    assert start["warm_num_compiled"] == [0]
    assert sum(start["warm_phases"].values()) == pytest.approx(
        start["avg_warm_startup_time"], rel=0.1
    )
    assert start["avg_warm_complete_time"] >= start["avg_warm_startup_time"]


def test_log_lines() -> None:
    record = logging.LogRecord("a.b", logging.INFO, "", 0, "did %s", ("it",), None)
    record.fields = {"request_id": "x", "tokens": 3}
    line = json.loads(logs.JsonFormatter().format(record))
    assert (line["message"], line["request_id"], line["level"]) == ("did it", "x", "info")
    assert logs.ConsoleFormatter().format(record).endswith("did it  request_id=x tokens=3")
    with pytest.raises(ValueError, match="log format"):
        logs.check_format("xml")
