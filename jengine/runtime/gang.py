"""One engine over several processes: each joins JAX's world and meets the others; the leader says
which programs it runs, and the followers run them too (`jengine/distributed/`).
"""

import collections
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from jengine.cluster import VARIABLES, Cluster, ClusterFlags, discover
from jengine.config import EngineConfig, environment
from jengine.distributed.channel import (
    FollowerChannel,
    GangSettings,
    LeaderChannel,
    form_gang,
    join_gang,
)
from jengine.distributed.protocol import ProgramCall, facts_of
from jengine.distributed.watchdog import StepWatchdog
from jengine.errors import ConfigurationError, ExitCode
from jengine.runtime.aot import source_digest
from jengine.runtime.blueprint import Blueprint
from jengine.runtime.runner import ModelRunner
from jengine.runtime.step import StepOutput

STEP_SECONDS = 120.0  # that a dispatched step may take; nothing is compiled meanwhile
MAX_IN_FLIGHT = 2  # steps of a follower, as of the leader


def join_world(flags: ClusterFlags) -> Cluster:
    """Before anything starts JAX's back end. Raises `ConfigurationError`."""
    cluster = discover(flags, environment(VARIABLES))
    for name, value in cluster.jax_config().items():
        jax.config.update(name, value)
    jax.distributed.initialize(**cluster.jax_initialize())
    return cluster


class Leader:
    """Tells the followers what to run, and sees to it that steps end."""

    def __init__(self, channel: LeaderChannel) -> None:
        self._channel = channel
        self._watchdog = StepWatchdog(STEP_SECONDS, channel.fail)

    def tell(self, program: str, arrays: tuple[np.ndarray, ...]) -> None:
        """Before the program runs here."""
        self._channel.send(ProgramCall(program, arrays))

    def waiting(self) -> AbstractContextManager[None]:
        """Around waiting for a step's results."""
        return self._watchdog.step("a step")

    def close(self) -> None:
        """The orderly end: followers finish, and end with exit code 0."""
        self._watchdog.close()
        self._channel.close()
        jax.distributed.shutdown()

    def fail(self, reason: str) -> None:
        """Ends every process of the gang, this one included."""
        self._channel.fail(ExitCode.RESTART, reason)


def meet(
    cluster: Cluster, config: EngineConfig, blueprint: Blueprint
) -> LeaderChannel | FollowerChannel:
    """Wait for the others. Raises `GangError` if they would run other programs."""
    if blueprint.model.split.data > 1:
        raise ConfigurationError(
            f"data_parallel_size must be 1 in an engine over several processes, "
            f"got {blueprint.model.split.data}: start several such engines"
        )
    keys = dict.fromkeys(blueprint.programs.names, blueprint.key)
    settings = GangSettings.of(cluster, facts_of(config, source_digest()), keys)
    return form_gang(settings) if cluster.is_leader else join_gang(settings)


def follow(runner: ModelRunner, channel: FollowerChannel) -> None:
    """Run what the leader runs until it ends in good order. Ends the process if it does not."""
    with channel:
        watchdog = StepWatchdog(STEP_SECONDS, channel.fail)
        in_flight: collections.deque[Any] = collections.deque()
        while (call := channel.receive()) is not None:
            output = runner.execute(call.program, call.arrays)
            if isinstance(output, StepOutput):
                in_flight.append(output.sampled)
            if len(in_flight) > MAX_IN_FLIGHT:
                with watchdog.step("a step"):
                    jax.block_until_ready(in_flight.popleft())
        watchdog.close()
    jax.distributed.shutdown()
