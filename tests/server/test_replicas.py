"""What a host is to run, decided from flags alone; and command lines that parse to what they were
made from."""

import dataclasses
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from jengine.errors import ConfigurationError
from jengine.server import __main__ as cli
from jengine.server import replica_flags
from jengine.server.cli_options import EngineFlags
from jengine.server.flag_groups import takes
from jengine.server.replica_flags import ReplicaFlags, command_maker
from jengine.server.replicas import Replica, SupervisorSettings, plan_replicas
from jengine.server.server_flags import ServerFlags
from jengine.server.settings import ServerSettings

runner = CliRunner()
Flags = tuple[EngineFlags, ServerFlags, ReplicaFlags]


def parse(*argv: str) -> tuple[Flags, list[Any]]:
    """The flags, and the parser's own parameters."""
    app = typer.Typer()
    box: list[tuple[Flags, list[Any]]] = []

    @app.command()
    @takes(EngineFlags, ServerFlags, ReplicaFlags)
    def command(
        engine: EngineFlags, server: ServerFlags, replicas: ReplicaFlags, context: typer.Context
    ) -> None:
        box.append(((engine, server, replicas), context.command.params))

    result = runner.invoke(app, list(argv))
    assert result.exit_code == 0, result.output
    return box[0]


def plan(settings: ServerSettings | None = None, **changes: Any) -> tuple[Replica, ...]:
    arguments = {"size": 4, "size_local": 2, "start_rank": 2, "gpus_each": 1, "gpus": None}
    return plan_replicas(settings or ServerSettings(), 9256, **(arguments | changes))


def test_replicas_have_ranks_of_the_fleet_and_ports_of_the_host() -> None:
    assert plan() == (Replica(2, 8000, 50051, ()), Replica(3, 8001, 50052, ()))
    gpus = ("GPU-a", "GPU-b", "5", "6", "7")
    assert [r.gpus for r in plan(gpus=gpus, gpus_each=2)] == [("GPU-a", "GPU-b"), ("5", "6")]
    assert [r.grpc_port for r in plan(ServerSettings(grpc_port=None))] == [None, None]


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({}, {"size_local": 5}, r"size-local must be from 1 to --data-parallel-size \(4\), got 5"),
        ({}, {"size_local": 0}, "from 1 to"),
        ({}, {"start_rank": 3}, "start-rank 3 with 2 replicas"),
        ({}, {"start_rank": -1}, "start-rank -1"),
        ({}, {"gpus": ("0", "1", "2"), "gpus_each": 2}, "need 4, and this host shows 3"),
        ({"port": None}, {}, "--no-http"),
        ({"uds": "/x"}, {}, "--uds"),
        ({"port": 0}, {}, "consecutive ports"),
        ({"grpc_port": 0}, {}, "consecutive ports"),
        ({"port": 9255}, {}, "9256 is taken twice: --data-parallel-supervisor-port and --port of"),
        ({"port": 50050}, {}, "50051 is taken twice: --port of rank 3 and --grpc-port of rank 2"),
        ({"port": 65535}, {}, "--port of rank 3 must be from 1 to 65535"),
    ],
)
def test_plans_that_cannot_be(settings: Any, changes: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan(ServerSettings(**settings), **changes)


def test_a_replicas_command_line_parses_to_the_flags_it_was_made_from() -> None:
    argv = ["--dtype", "float32", "--served-model-name", "a b", "--served-model-name", "-c"]
    argv += ["--hf-overrides", '{"x": [1, "-y"]}', "--no-enable-prefix-caching", "--max-num-seqs=4"]
    argv += ["--disable-log-requests", "--api-key", "k1", "--api-key", "k2", "--host", "::1"]
    argv += ["--async-scheduling", "--shutdown-timeout", "2.5", "--disable-log-stats", "-dpm"]
    argv += ["--tool-call-parser", "deepseek_v4", "--enable-auto-tool-choice"]
    argv += ["--data-parallel-size", "2", "-dpl", "1", "--grpc-port", "7", "--", "-odd model-"]
    (engine, server, replicas), parameters = parse(*argv)
    assert replicas.data_parallel_multi_port_external_lb
    assert replicas.data_parallel_size_local == 1
    command = command_maker(engine, server, parameters)(Replica(1, 8001, 8, ()))
    words = command[command.index("serve") + 1 :]
    (again, again_server, again_replicas), _ = parse(*words)
    assert again == dataclasses.replace(engine, data_parallel_size=None)
    assert again_server == dataclasses.replace(server, port=8001, grpc_port=8)
    assert again_replicas == ReplicaFlags(follow_stdin=True)


@pytest.mark.parametrize(
    ("variables", "argv", "ranks"),
    [
        ({}, [], [0, 1]),
        ({}, ["--node-rank", "1"], [2, 3]),
        ({}, ["-dpr", "1"], [1, 2]),
        ({"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "a"}, [], [2, 3]),
    ],
)
def test_the_first_rank_is_found_out(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], argv: list[str], ranks: list[int]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    flags, _ = parse("m", "--data-parallel-size", "4", "-dpm", "-dpl", "2", *argv)
    assert [replica.rank for replica in replica_flags.replicas_of(*flags)] == ranks


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-dpl", "2"], "needs --data-parallel-multi-port-external-lb"),
        (["--node-rank", "1"], "--node-rank needs --nnodes"),
        (["-dpm", "--data-parallel-size", "2", "--max-num-seqs", "0"], "max_num_seqs must be >= 1"),
        (
            ["-dpm", "--data-parallel-size", "2", "--data-parallel-on-failure", "x"],
            "must be stop or restart, got 'x'",
        ),
        (
            ["-dpm", "--data-parallel-size", "2", "--dp-supervisor-probe-interval-s", "0"],
            "probe-interval-s must be > 0",
        ),
    ],
)
def test_bad_flags(argv: list[str], message: str) -> None:
    result = runner.invoke(cli.app, ["serve", "m", *argv], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output


def test_a_bad_configuration_has_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["jengine", "serve", "m", "-dpm"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 78
    assert "needs --data-parallel-size" in capsys.readouterr().err


def test_settings_are_vllms() -> None:
    (_, _, flags), _ = parse("m")
    assert flags.supervisor_settings() == SupervisorSettings(9256, 5.0, 5.0, 3, "stop")
