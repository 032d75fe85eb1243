"""Which replicas a host runs, and on which ports and GPUs: pure, decided before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jengine.errors import ConfigurationError
from jengine.server.settings import ServerSettings

MAX_PORT = 65535
OnFailure = Literal["stop", "restart"]


@dataclass(frozen=True, slots=True)
class Replica:
    """One API server with an engine of its own. `rank` counts over all hosts, ports do not."""

    rank: int
    port: int
    grpc_port: int | None
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES spells them; () leaves that variable alone


@dataclass(frozen=True, slots=True)
class SupervisorSettings:
    """How replicas are watched. `on_failure` "stop" ends all when one is lost, as vLLM does, and
    leaves the restart to the launcher; "restart" replaces the lost one while the others serve.
    """

    port: int = 9256
    probe_interval: float = 5.0
    probe_timeout: float = 5.0
    probe_failures: int = 3  # unanswered probes in a row after which a replica counts as lost
    on_failure: OnFailure = "stop"

    def __post_init__(self) -> None:
        if self.on_failure not in ("stop", "restart"):
            raise ValueError(
                f"--data-parallel-on-failure must be stop or restart, got {self.on_failure!r}"
            )
        bounds = {
            "--dp-supervisor-probe-interval-s": self.probe_interval,
            "--dp-supervisor-probe-timeout-s": self.probe_timeout,
            "--dp-supervisor-probe-failure-threshold": self.probe_failures,
        }
        for flag, value in bounds.items():
            if value <= 0:
                raise ValueError(f"{flag} must be > 0, got {value}")


def plan_replicas(
    server: ServerSettings,
    supervisor_port: int,
    *,
    size: int,
    size_local: int,
    start_rank: int,
    gpus_each: int,
    gpus: Sequence[str] | None,
) -> tuple[Replica, ...]:
    """The replicas of this host. `size` counts over all hosts; `gpus` are those of this host, None
    on a CPU. Raises `ConfigurationError`.
    """
    if size < 1 or not 1 <= size_local <= size:
        raise ConfigurationError(
            f"--data-parallel-size-local must be from 1 to --data-parallel-size ({size}), "
            f"got {size_local}"
        )
    if not 0 <= start_rank <= size - size_local:
        raise ConfigurationError(
            f"--data-parallel-start-rank {start_rank} with {size_local} replicas on this host "
            f"exceeds --data-parallel-size ({size})"
        )
    if gpus is not None and size_local * gpus_each > len(gpus):
        raise ConfigurationError(
            f"{size_local} replicas of {gpus_each} GPUs each need {size_local * gpus_each}, "
            f"and this host shows {len(gpus)}"
        )
    _check_server(server)
    replicas = tuple(
        Replica(
            rank=start_rank + i,
            port=(server.port or 0) + i,
            grpc_port=None if server.grpc_port is None else server.grpc_port + i,
            gpus=() if gpus is None else tuple(gpus[i * gpus_each : (i + 1) * gpus_each]),
        )
        for i in range(size_local)
    )
    _check_ports(replicas, supervisor_port)
    return replicas


def _check_server(server: ServerSettings) -> None:
    if server.port is None or server.uds is not None:
        raise ConfigurationError("replicas are probed over HTTP: neither --no-http nor --uds goes")
    if server.port == 0 or server.grpc_port == 0:
        raise ConfigurationError(
            "replicas take consecutive ports from --port and --grpc-port: 0 cannot be counted from"
        )


def _check_ports(replicas: Sequence[Replica], supervisor_port: int) -> None:
    owners: dict[int, str] = {}
    uses = [(supervisor_port, "--data-parallel-supervisor-port")]
    uses += [(r.port, f"--port of rank {r.rank}") for r in replicas]
    uses += [(p, f"--grpc-port of rank {r.rank}") for r in replicas if (p := r.grpc_port)]
    for port, use in uses:
        if not 0 < port <= MAX_PORT:
            raise ConfigurationError(f"{use} must be from 1 to {MAX_PORT}, got {port}")
        if port in owners:
            raise ConfigurationError(f"port {port} is taken twice: {owners[port]} and {use}")
        owners[port] = use
