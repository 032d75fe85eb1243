"""Who am I among how many: each launcher's variables, their order, and what contradicts itself."""

import inspect
from typing import Any

import jax
import pytest

from jengine.cluster import VARIABLES, Cluster, ClusterFlags, discover, expand_nodes
from jengine.errors import ConfigurationError

LWS = {"LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "3", "LWS_LEADER_ADDRESS": "m-0.m.default"}
SLURM = {
    "SLURM_JOB_ID": "123457",
    "SLURM_STEP_NODELIST": "node[07-08,11],gpu1",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
OMPI6 = {**OMPI, "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d,2620::3000:2]:43370"}
JOBSET = {
    "JOB_COMPLETION_INDEX": "1",
    "JOBSET_NAME": "big",
    "REPLICATED_JOB_NAME": "workers",
    "JENGINE_NUM_PROCESSES": "2",
}
OURS = {
    "JENGINE_PROCESS_ID": "1",
    "JENGINE_NUM_PROCESSES": "2",
    "JENGINE_COORDINATOR_HOST": "ours",
}
NO_FLAGS = ClusterFlags()


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        (NO_FLAGS, {}, (0, 1, "127.0.0.1:29501", "one host")),
        (NO_FLAGS, {"HOME": "/x"}, (0, 1, "127.0.0.1:29501", "one host")),
        (NO_FLAGS, LWS, (3, 4, "m-0.m.default:29501", "LeaderWorkerSet")),
        (NO_FLAGS, SLURM, (5, 8, "node07:21828", "SLURM")),
        (NO_FLAGS, OMPI, (1, 2, "10.96.0.1:29501", "Open MPI")),
        (NO_FLAGS, OMPI6, (1, 2, "[fe80::b9b:ac5d]:29501", "Open MPI")),
        (NO_FLAGS, JOBSET, (1, 2, "big-workers-0-0.big:29501", "Kubernetes Job")),
        (NO_FLAGS, OURS, (1, 2, "ours:29501", "flags or JENGINE_*")),
        # The order of launchers.
        (NO_FLAGS, {**SLURM, **OMPI, **LWS}, (3, 4, "m-0.m.default:29501", "LeaderWorkerSet")),
        (NO_FLAGS, {**SLURM, **OMPI}, (5, 8, "node07:21828", "SLURM")),
        (NO_FLAGS, {**OMPI, "JOB_COMPLETION_INDEX": "0"}, (1, 2, "10.96.0.1:29501", "Open MPI")),
        # Flags before ours, ours before launchers, fact by fact.
        (ClusterFlags(0, 3, "f", 7), LWS | OURS, (0, 3, "f:7", "flags or JENGINE_*")),
        (ClusterFlags(process_id=0), LWS | OURS, (0, 2, "ours:29501", "flags or JENGINE_*")),
        (ClusterFlags(coordinator_port=7), LWS, (3, 4, "m-0.m.default:7", "LeaderWorkerSet")),
        (NO_FLAGS, {**LWS, "JENGINE_COORDINATOR_PORT": "8"}, (3, 4, "m-0.m.default:8", "Leader")),
        (NO_FLAGS, {**JOBSET, "JENGINE_COORDINATOR_HOST": "h"}, (1, 2, "h:29501", "Kubernetes")),
        # A SLURM batch script is not a step; salloc's shell neither.
        (NO_FLAGS, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1, "127.0.0.1:29501", "one")),
        (ClusterFlags(1, 2, "::1"), {}, (1, 2, "[::1]:29501", "flags")),
        (ClusterFlags(1, 2, "[::1]"), {}, (1, 2, "[::1]:29501", "flags")),
    ],
)
def test_discovery(flags: ClusterFlags, environment: dict[str, str], expected: Any) -> None:
    process_id, num_processes, address, source = expected
    found = discover(flags, environment)
    assert (found.process_id, found.num_processes) == (process_id, num_processes)
    assert found.coordinator_address == address
    assert found.source.startswith(source)
    assert found.is_leader == (process_id == 0)


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (ClusterFlags(process_id=1), {}, "--node-rank is there: --nnodes or JENGINE_NUM_PROCESSES"),
        (ClusterFlags(num_processes=2), {}, "--nnodes is there: --node-rank or JENGINE_PROCESS_ID"),
        (ClusterFlags(0, 2), {}, "2 processes need --master-addr or JENGINE_COORDINATOR_HOST"),
        (ClusterFlags(2, 2, "h"), {}, r"--node-rank must be from 0 to 1 \(--nnodes is 2\), got 2"),
        (ClusterFlags(-1, 2, "h"), {}, "--node-rank must be from 0 to 1"),
        (ClusterFlags(0, 0, "h"), {}, "--nnodes must be >= 1, got 0"),
        (ClusterFlags(0, 2, "h:80"), {}, "--master-addr must be a host without a port"),
        (ClusterFlags(0, 2, "a b"), {}, "--master-addr must be a host"),
        (ClusterFlags(0, 2, "h", 65535), {}, "--master-port must be from 1 to 65531, got 65535"),
        (NO_FLAGS, {**OURS, "JENGINE_PROCESS_ID": "x"}, "JENGINE_PROCESS_ID must be a number"),
        (NO_FLAGS, {**OURS, "JENGINE_PROCESS_ID": "-1"}, "JENGINE_PROCESS_ID must be a number"),
        (NO_FLAGS, {**OURS, "JENGINE_PROCESS_ID": "2"}, "JENGINE_PROCESS_ID must be from 0 to 1"),
        (NO_FLAGS, {**LWS, "LWS_WORKER_INDEX": "4"}, r"LWS_WORKER_INDEX .*LWS_GROUP_SIZE is 4"),
        (
            NO_FLAGS,
            {**LWS, "JENGINE_NUM_PROCESSES": "2"},
            r"LWS_.*JENGINE_NUM_PROCESSES is 2\), got 3",
        ),
        (NO_FLAGS, {"LWS_GROUP_SIZE": "2"}, "LWS_WORKER_INDEX is not set"),
        (NO_FLAGS, {**LWS, "LWS_LEADER_ADDRESS": "h:1"}, "LWS_LEADER_ADDRESS must be a host"),
        (NO_FLAGS, {**SLURM, "SLURM_STEP_NUM_NODES": "3"}, "SLURM_STEP_NUM_NODES is 3, but"),
        (NO_FLAGS, {**SLURM, "SLURM_STEP_NODELIST": "n[3-1]"}, r"SLURM_STEP_NODELIST: '3-1' in"),
        (NO_FLAGS, {**SLURM, "SLURM_PROCID": "8"}, "SLURM_PROCID must be from 0 to 7"),
        (NO_FLAGS, {**SLURM, "SLURM_JOB_ID": "a"}, "SLURM_JOB_ID must be a number"),
        (NO_FLAGS, {"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is not set"),
        (NO_FLAGS, {**OMPI, "OMPI_MCA_orte_hnp_uri": "?"}, "OMPI_MCA_orte_hnp_uri has no address"),
        (NO_FLAGS, {"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETION_INDEX is there: --nnodes or"),
        (NO_FLAGS, {**JOBSET, "JOBSET_NAME": "b"} | {"JOB_COMPLETION_INDEX": "2"}, "from 0 to 1"),
        (NO_FLAGS, {"JOB_COMPLETION_INDEX": "0", "JOBSET_NAME": "b"}, "REPLICATED_JOB_NAME go"),
    ],
)
def test_what_cannot_be(flags: ClusterFlags, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        discover(flags, environment)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("node1", ["node1"]),
        ("a,b-2,c", ["a", "b-2", "c"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101].x,login", ["n098.x", "n099.x", "n100.x", "n101.x", "login"]),
        ("r[1-2]n[01,03]", ["r1n01", "r1n03", "r2n01", "r2n03"]),
        ("a[1],b[2-3]", ["a1", "b2", "b3"]),
    ],
)
def test_node_lists(text: str, nodes: list[str]) -> None:
    assert expand_nodes(text) == nodes


@pytest.mark.parametrize("text", ["", ",", "a,", "n[", "n]1", "n[]", "n[1-]", "n[a-b]", "n[1-2-3]"])
def test_no_node_lists(text: str) -> None:
    with pytest.raises(ConfigurationError, match="SLURM_STEP_NODELIST"):
        expand_nodes(text)


def test_what_jax_is_told_exists_there() -> None:
    found = discover(NO_FLAGS, {**LWS, "JENGINE_BIND_HOST": "10.0.0.3"})
    arguments = found.jax_initialize()
    assert arguments["coordinator_bind_address"] == "10.0.0.3:29501"
    assert 10 <= arguments["heartbeat_timeout_seconds"] <= 20
    assert set(arguments) <= set(inspect.signature(jax.distributed.initialize).parameters)
    for name, value in found.jax_config().items():
        assert type(getattr(jax.config, name)) is type(value)
    assert found.jax_config() == {"jax_enable_preemption_service": False}
    alone = discover(NO_FLAGS, LWS)
    assert alone.jax_initialize()["coordinator_bind_address"] == "m-0.m.default:29501"


def test_every_variable_that_is_read_is_listed() -> None:
    """What the caller does not hand over cannot be found: discovery over the listed names alone."""
    for environment in (LWS, SLURM, OMPI, JOBSET, OURS):
        assert set(environment) <= set(VARIABLES)
    assert discover(NO_FLAGS, {n: v for n, v in SLURM.items() if n in VARIABLES}) == Cluster(
        5, 8, "node07", 21828, "node07", "SLURM"
    )
