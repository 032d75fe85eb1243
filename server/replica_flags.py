"""Flags of `jengine serve` that make it a supervisor of replicas, and the command line of each."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jengine.cluster import VARIABLES, ClusterFlags, discover
from jengine.config import environment, expects_gpu, visible_gpus
from jengine.errors import ConfigurationError
from jengine.server.replicas import Replica, SupervisorSettings, plan_replicas

if TYPE_CHECKING:
    from jengine.server.cli_options import EngineFlags
    from jengine.server.server_flags import ServerFlags
    from jengine.server.supervisor import MakeCommand

_REPLICAS = "Replicas"
_CLUSTER = "Cluster"


def _flag(*names: str, panel: str, text: str, hidden: bool = False) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, hidden=hidden)


@dataclass(frozen=True)
class ReplicaFlags:
    """Several engines on this host, each a server with a port of its own. Spelled as vLLM's."""

    data_parallel_multi_port_external_lb: Annotated[
        bool,
        _flag(
            "--data-parallel-multi-port-external-lb",
            "-dpm",
            panel=_REPLICAS,
            text="Serve --data-parallel-size replicas, on consecutive ports.",
        ),
    ] = False
    data_parallel_size_local: Annotated[
        int | None,
        _flag(
            "--data-parallel-size-local",
            "-dpl",
            panel=_REPLICAS,
            text="Replicas on this host; by default all.",
        ),
    ] = None
    data_parallel_start_rank: Annotated[
        int | None,
        _flag(
            "--data-parallel-start-rank",
            "-dpr",
            panel=_REPLICAS,
            text="Rank of this host's first replica; by default --node-rank times the local size.",
        ),
    ] = None
    data_parallel_supervisor_port: Annotated[
        int,
        _flag(
            "--data-parallel-supervisor-port",
            panel=_REPLICAS,
            text="HTTP port of /health, /ready and /readyz over all replicas.",
        ),
    ] = 9256
    dp_supervisor_probe_interval_s: Annotated[
        float,
        _flag(
            "--dp-supervisor-probe-interval-s", panel=_REPLICAS, text="Between probes of /health."
        ),
    ] = 5.0
    dp_supervisor_probe_timeout_s: Annotated[
        float,
        _flag("--dp-supervisor-probe-timeout-s", panel=_REPLICAS, text="For an answer to one."),
    ] = 5.0
    dp_supervisor_probe_failure_threshold: Annotated[
        int,
        _flag(
            "--dp-supervisor-probe-failure-threshold",
            panel=_REPLICAS,
            text="Unanswered probes in a row after which a replica is lost.",
        ),
    ] = 3
    data_parallel_on_failure: Annotated[
        str,
        _flag(
            "--data-parallel-on-failure",
            panel=_REPLICAS,
            text="stop: a lost replica ends all, as in vLLM; restart: it alone is replaced.",
        ),
    ] = "stop"
    nnodes: Annotated[
        int | None,
        _flag(
            "--nnodes",
            panel=_CLUSTER,
            text="Hosts, of one engine or of replicas.",
        ),
    ] = None
    node_rank: Annotated[
        int | None, _flag("--node-rank", panel=_CLUSTER, text="Of this host; else found out.")
    ] = None
    master_addr: Annotated[
        str | None, _flag("--master-addr", panel=_CLUSTER, text="Host 0; else found out.")
    ] = None
    master_port: Annotated[
        int | None, _flag("--master-port", panel=_CLUSTER, text="Its port; else 29501.")
    ] = None
    follow_stdin: Annotated[
        bool,
        _flag(
            "--follow-stdin",
            panel=_REPLICAS,
            text="Drain when standard input, a pipe, ends.",
            hidden=True,
        ),
    ] = False

    def cluster_flags(self) -> ClusterFlags:
        return ClusterFlags(
            num_processes=self.nnodes,
            process_id=self.node_rank,
            coordinator_host=self.master_addr,
            coordinator_port=self.master_port,
        )

    @property
    def gang(self) -> ClusterFlags | None:
        """Without the supervisor, several hosts run one engine."""
        alone = self.data_parallel_multi_port_external_lb or self.nnodes in (None, 1)
        return None if alone else self.cluster_flags()

    def supervisor_settings(self) -> SupervisorSettings:
        try:
            return SupervisorSettings(
                port=self.data_parallel_supervisor_port,
                probe_interval=self.dp_supervisor_probe_interval_s,
                probe_timeout=self.dp_supervisor_probe_timeout_s,
                probe_failures=self.dp_supervisor_probe_failure_threshold,
                on_failure=self.data_parallel_on_failure,  # type: ignore[arg-type]
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    def check_unused(self) -> None:
        """Without the supervisor its flags would be silently ignored."""
        if self.data_parallel_multi_port_external_lb:
            return
        needs = {
            "data_parallel_size_local": "--data-parallel-multi-port-external-lb",
            "data_parallel_start_rank": "--data-parallel-multi-port-external-lb",
        }
        if self.nnodes is None:
            needs |= dict.fromkeys(("node_rank", "master_addr", "master_port"), "--nnodes")
        for name, needed in needs.items():
            if getattr(self, name) is not None:
                raise typer.BadParameter(f"--{name.replace('_', '-')} needs {needed}")


def replicas_of(
    engine: EngineFlags, server: ServerFlags, flags: ReplicaFlags
) -> tuple[Replica, ...]:
    """What this host is to run. Raises `ConfigurationError`."""
    size = engine.data_parallel_size
    if size is None:
        raise ConfigurationError(
            "--data-parallel-multi-port-external-lb needs --data-parallel-size"
        )
    local = size if flags.data_parallel_size_local is None else flags.data_parallel_size_local
    start_rank = flags.data_parallel_start_rank
    if start_rank is None:
        host = flags.node_rank
        if host is None:
            host = discover(flags.cluster_flags(), environment(VARIABLES)).process_id
        start_rank = host * local
    return plan_replicas(
        server.build(),
        flags.data_parallel_supervisor_port,
        size=size,
        size_local=local,
        start_rank=start_rank,
        gpus_each=engine.tensor_parallel_size or 1,
        gpus=visible_gpus() if expects_gpu() else None,
    )


def command_maker(
    engine: EngineFlags, server: ServerFlags, parameters: Sequence[Any]
) -> MakeCommand:
    """Command lines of replicas: `serve` with the flags we were given, less those of replicas.
    `parameters` are the `serve` command's, as its parser knows them.
    """
    engine = dataclasses.replace(engine, data_parallel_size=None)
    engine.build()  # what is wrong with it shows here, and not once in each replica

    def make_command(replica: Replica) -> list[str]:
        changes: dict[str, Any] = {"port": replica.port}
        if replica.grpc_port is not None:
            changes["grpc_port"] = replica.grpc_port
        values = _changed(engine) | _changed(dataclasses.replace(server, **changes))
        values |= _changed(ReplicaFlags(follow_stdin=True))
        words = as_arguments(values, parameters)
        return [sys.executable, "-m", "jengine.server", "serve", *words]

    return make_command


def as_arguments(values: Mapping[str, Any], parameters: Sequence[Any]) -> list[str]:
    """The inverse of parsing: `values` by parameter name -> words that parse to them."""
    options: list[str] = []
    positional: list[str] = []
    for parameter in parameters:
        value = values.get(parameter.name)
        if value is None:
            continue
        if parameter.param_type_name == "argument":
            positional.append(str(value))
        elif isinstance(value, bool):
            options.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            items = value if isinstance(value, (list, tuple)) else [value]
            options += [f"{parameter.opts[0]}={item}" for item in items]
    return [*options, "--", *positional] if positional else options


def _changed(flags: Any) -> dict[str, Any]:
    """The fields that were given: those that differ from their defaults."""
    return {
        f.name: value
        for f in dataclasses.fields(flags)
        if (value := getattr(flags, f.name)) != f.default
    }
