"""Which process of how many this is, and where process 0 listens: from flags, and from what
launchers put into the environment. Pure: the caller reads the environment (`VARIABLES`).

The first launcher that is there speaks: LeaderWorkerSet, SLURM, Open MPI, an indexed Kubernetes
Job (of a JobSet, perhaps), else one host. Single facts are overridden by `JENGINE_*`, and those by
flags.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from jengine.errors import ConfigurationError

DEFAULT_PORT = 29501  # of vLLM's --master-port
PORTS_EACH = 4  # from the coordinator's port on: JAX, steps, control, one spare
MAX_PORT = 65535
HEARTBEAT_SECONDS = 15  # JAX's own 100 would leave requests hanging for as long

_OURS = {
    "process_id": "JENGINE_PROCESS_ID",
    "num_processes": "JENGINE_NUM_PROCESSES",
    "coordinator_host": "JENGINE_COORDINATOR_HOST",
    "coordinator_port": "JENGINE_COORDINATOR_PORT",
    "bind_host": "JENGINE_BIND_HOST",
}
_FLAGS = {
    "process_id": "--node-rank",
    "num_processes": "--nnodes",
    "coordinator_host": "--master-addr",
    "coordinator_port": "--master-port",
}
VARIABLES = (
    *_OURS.values(),
    *("LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"),
    *("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS"),
    *("SLURM_NTASKS", "SLURM_PROCID"),
    *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"),
    *("JOB_COMPLETION_INDEX", "JOBSET_NAME", "REPLICATED_JOB_NAME"),
)

Environment = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ClusterFlags:
    """What the command line says; None is found out."""

    process_id: int | None = None
    num_processes: int | None = None
    coordinator_host: str | None = None
    coordinator_port: int | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """The processes that run one engine or, under a supervisor, the hosts of a deployment."""

    process_id: int
    num_processes: int
    coordinator_host: str
    coordinator_port: int
    bind_host: str
    source: str  # who said so, for logs

    @property
    def is_leader(self) -> bool:
        return self.process_id == 0

    @property
    def coordinator_address(self) -> str:
        return join_address(self.coordinator_host, self.coordinator_port)

    def jax_initialize(self) -> dict[str, Any]:
        """Arguments of `jax.distributed.initialize`. The coordination service binds one address:
        by itself it would take all, and JAX 0.10 has no way to ask who calls.
        """
        return {
            "coordinator_address": self.coordinator_address,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
            "coordinator_bind_address": join_address(self.bind_host, self.coordinator_port),
            "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
            "cluster_detection_method": "deactivate",  # it was detected here
        }

    def jax_config(self) -> dict[str, Any]:
        """For `jax.config.update`, before `jax.distributed.initialize`. With JAX's preemption
        service on, SIGTERM is swallowed and a drain never begins.
        """
        return {"jax_enable_preemption_service": False}


@dataclass(frozen=True, slots=True)
class _Facts:
    """What one source says, and how it calls it."""

    source: str
    process_id: int | None = None
    num_processes: int | None = None
    coordinator_host: str | None = None
    coordinator_port: int | None = None
    names: Mapping[str, str] | None = None  # field -> variable


def discover(flags: ClusterFlags, environment: Environment) -> Cluster:
    """Raises `ConfigurationError`, which names the flag or the variable that is wrong, contradicts
    another, or is missing.
    """
    given: dict[str, Any] = {}
    names: dict[str, str] = {}
    for field, name in _OURS.items():
        if (text := environment.get(name)) is not None:
            given[field] = text if field.endswith("host") else _integer(name, text)
            names[field] = name
    for field, name in _FLAGS.items():
        if (value := getattr(flags, field)) is not None:
            given[field], names[field] = value, name
    bind_host = given.pop("bind_host", None)
    is_complete = {"process_id", "num_processes"} <= set(given)
    launcher = None if is_complete else _launcher(environment)
    facts = replace(launcher or _Facts("flags or JENGINE_*" if given else "one host"), **given)
    names = {**((launcher and launcher.names) or {}), **names}
    return _check(facts, names, bind_host)


def expand_nodes(node_list: str, variable: str = "SLURM_STEP_NODELIST") -> list[str]:
    """Names of a SLURM node list: `a[01-03,07]b[1-2],c` -> a01b1, a01b2, a02b1, ..., c."""
    names: list[str] = []
    for item in _split_outside_brackets(node_list, variable):
        parts = re.split(r"\[([^\[\]]*)\]", item)  # literal, ranges, literal, ...
        if any(char in literal for literal in parts[::2] for char in "[]"):
            raise ConfigurationError(f"{variable}: brackets do not match in {item!r}")
        choices = [
            _expand_ranges(part, variable) if i % 2 else [part] for i, part in enumerate(parts)
        ]
        names += ["".join(choice) for choice in product(*choices)]
    return names


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check(facts: _Facts, names: Mapping[str, str], bind_host: str | None) -> Cluster:
    def name(field: str) -> str:
        return names.get(field) or f"{_FLAGS[field]} or {_OURS[field]}"

    count, process_id, host = facts.num_processes, facts.process_id, facts.coordinator_host
    if count is None and process_id is None:
        count, process_id = 1, 0
    if count is None:
        raise ConfigurationError(f"{name('process_id')} is there: {name('num_processes')} must be")
    if process_id is None:
        raise ConfigurationError(f"{name('num_processes')} is there: {name('process_id')} must be")
    if count < 1:
        raise ConfigurationError(f"{name('num_processes')} must be >= 1, got {count}")
    if not 0 <= process_id < count:
        raise ConfigurationError(
            f"{name('process_id')} must be from 0 to {count - 1} "
            f"({name('num_processes')} is {count}), got {process_id}"
        )
    if host is None:
        if count > 1:
            raise ConfigurationError(f"{count} processes need {name('coordinator_host')}")
        host = "127.0.0.1"
    host = host.strip("[]")
    if not host or re.search(r"[\s/]", host) or (":" in host and not _is_address(host)):
        raise ConfigurationError(
            f"{name('coordinator_host')} must be a host without a port, got {host!r}"
        )
    port = DEFAULT_PORT if facts.coordinator_port is None else facts.coordinator_port
    if not 0 < port <= MAX_PORT - PORTS_EACH:
        raise ConfigurationError(
            f"{name('coordinator_port')} must be from 1 to {MAX_PORT - PORTS_EACH}, got {port}"
        )
    return Cluster(process_id, count, host, port, (bind_host or host).strip("[]"), facts.source)


def _launcher(environment: Environment) -> _Facts | None:
    for is_there, read in _LAUNCHERS:
        if is_there in environment:
            return read(environment)
    return None


def _lws(environment: Environment) -> _Facts:
    return _Facts(
        "LeaderWorkerSet",
        _needed(environment, "LWS_WORKER_INDEX"),
        _needed(environment, "LWS_GROUP_SIZE"),
        environment.get("LWS_LEADER_ADDRESS"),
        names={
            "process_id": "LWS_WORKER_INDEX",
            "num_processes": "LWS_GROUP_SIZE",
            "coordinator_host": "LWS_LEADER_ADDRESS",
        },
    )


def _slurm(environment: Environment) -> _Facts:
    """Of a step. A batch script has SLURM_NTASKS and SLURM_PROCID, too, but no step: what it runs
    without srun is alone.
    """
    nodes = expand_nodes(environment["SLURM_STEP_NODELIST"])
    num_nodes = environment.get("SLURM_STEP_NUM_NODES")
    if num_nodes is not None and _integer("SLURM_STEP_NUM_NODES", num_nodes) != len(nodes):
        raise ConfigurationError(
            f"SLURM_STEP_NUM_NODES is {num_nodes}, but SLURM_STEP_NODELIST names {len(nodes)} nodes"
        )
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    job = _integer("SLURM_JOB_ID", environment.get("SLURM_JOB_ID", "0"))
    return _Facts(
        "SLURM",
        _needed(environment, "SLURM_PROCID"),
        _needed(environment, count),
        nodes[0],
        # Jobs that share a node must not meet; below the ports that connections draw from.
        20_000 + PORTS_EACH * (job % 3_000),
        names={
            "process_id": "SLURM_PROCID",
            "num_processes": count,
            "coordinator_host": "SLURM_STEP_NODELIST",
        },
    )


def _open_mpi(environment: Environment) -> _Facts:
    """The launcher's address is there up to Open MPI 4, and taken for rank 0's host."""
    host = None
    uri = environment.get("OMPI_MCA_orte_hnp_uri")
    if uri is not None:
        found = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
        if found is None:
            raise ConfigurationError(f"OMPI_MCA_orte_hnp_uri has no address: {uri!r}")
        host = found[1] or found[2]
    return _Facts(
        "Open MPI",
        _needed(environment, "OMPI_COMM_WORLD_RANK"),
        _needed(environment, "OMPI_COMM_WORLD_SIZE"),
        host,
        names={"process_id": "OMPI_COMM_WORLD_RANK", "num_processes": "OMPI_COMM_WORLD_SIZE"},
    )


def _kubernetes_job(environment: Environment) -> _Facts:
    """Kubernetes says the index alone. The number must come from us; the host of index 0 follows
    from the names of a JobSet.
    """
    jobset, job = environment.get("JOBSET_NAME"), environment.get("REPLICATED_JOB_NAME")
    if (jobset is None) != (job is None):
        raise ConfigurationError("JOBSET_NAME and REPLICATED_JOB_NAME go together")
    host = None if jobset is None else f"{jobset}-{job}-0-0.{jobset}"
    names = {"process_id": "JOB_COMPLETION_INDEX"}
    return _Facts(
        "Kubernetes Job", _needed(environment, "JOB_COMPLETION_INDEX"), None, host, names=names
    )


# The variable that tells that a launcher is there, and what reads its facts.
_LAUNCHERS: tuple[tuple[str, Callable[[Environment], _Facts]], ...] = (
    ("LWS_GROUP_SIZE", _lws),
    ("SLURM_STEP_NODELIST", _slurm),
    ("OMPI_COMM_WORLD_SIZE", _open_mpi),
    ("JOB_COMPLETION_INDEX", _kubernetes_job),
)


def _needed(environment: Environment, name: str) -> int:
    if name not in environment:
        raise ConfigurationError(f"{name} is not set, though the launcher's other variables are")
    return _integer(name, environment[name])


def _integer(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise ConfigurationError(f"{name} must be a number >= 0, got {text!r}")
    return int(text)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _split_outside_brackets(node_list: str, variable: str) -> list[str]:
    items = re.findall(r"(?:\[[^\]]*\]|[^,])+", node_list)
    if not items or node_list != ",".join(items):
        raise ConfigurationError(f"{variable} is not a list of nodes: {node_list!r}")
    return items


def _expand_ranges(ranges: str, variable: str) -> list[str]:
    """`01-03,07` -> 01, 02, 03, 07."""
    found: list[str] = []
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(last) < int(first):
            raise ConfigurationError(f"{variable}: {item!r} in [{ranges}] is not a range")
        found += [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    return found
