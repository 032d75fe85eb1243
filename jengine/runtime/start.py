"""How a runner starts: devices, model, programs and parameters, as far as possible at once."""

import contextlib
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax

from jengine.cluster import Cluster
from jengine.config import EngineConfig
from jengine.distributed.channel import FollowerChannel, LeaderChannel
from jengine.models.loader import ModelDefinition, load_parameters, open_model
from jengine.runtime.aot import Artifacts
from jengine.runtime.blueprint import (
    Blueprint,
    draw_blueprint,
    dummy_compiler,
    keep_jax_cache,
    open_artifacts,
)
from jengine.runtime.gang import Leader, meet
from jengine.runtime.memory import DeviceMemory, open_devices
from jengine.runtime.phases import Phases
from jengine.runtime.runner import ModelRunner
from jengine.sharding.placement import Placement


@dataclasses.dataclass(frozen=True)
class Opened:
    """What an engine is planned from. No parameter is read yet."""

    config: EngineConfig
    model: ModelDefinition
    placement: Placement
    device_memory: DeviceMemory
    artifacts: Artifacts

    def draw(self) -> Blueprint:
        return draw_blueprint(
            self.config, self.model, self.placement, self.device_memory, self.artifacts
        )


@dataclasses.dataclass(frozen=True)
class Started:
    """A runner that can serve, and what else its start brought."""

    runner: ModelRunner
    model: ModelDefinition
    num_drawn: int  # programs compiled to draw dummy parameters
    gang: Leader | FollowerChannel | None  # this process's part in it


def open_engine(config: EngineConfig, phases: Phases | None = None) -> Opened:
    """Starts the back end."""
    phases = phases or Phases()
    with phases.measure("device"):
        devices, device_memory = open_devices(config.cache, config.parallel.num_ranks)
    with phases.measure("model"):
        model = open_model(config)
        placement = Placement(model.split, devices)
        artifacts = open_artifacts(config, placement)
    return Opened(config, model, placement, device_memory, artifacts)


def load_runner(config: EngineConfig) -> ModelRunner:
    """A runner whose programs compile as they are needed; an engine prepares them ahead."""
    opened = open_engine(config)
    return ModelRunner(opened.draw(), load_parameters(opened.model, opened.placement))


def start_runner(
    config: EngineConfig,
    phases: Phases,
    own: Callable[[Callable[[], None]], None] = lambda close: None,
    cluster: Cluster | None = None,
) -> Started:
    """Load the model and prepare executables. `own` is told how to close what there is so far.

    Parameters arrive while executables are made ready; the KV cache comes last, since tuning needs
    memory. `cluster`: the processes that run this engine together. They meet before any of them
    reads parameters; an error after that ends them all.
    """
    opened = open_engine(config, phases)
    keep_jax_cache(opened.artifacts)
    draws = dummy_compiler(opened.artifacts, opened.model.split)
    with contextlib.ExitStack() as stack:
        thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="weights"))
        load = load_parameters, opened.model, opened.placement, draws
        weights = None if cluster is not None else thread.submit(*load)
        with phases.measure("plan"):
            blueprint = opened.draw()
            own(blueprint.programs.close)
        channel: LeaderChannel | FollowerChannel | None = None
        if cluster is not None:
            channel = meet(cluster, config, blueprint)
            stack.push(channel)
        weights = weights or thread.submit(*load)
        with phases.measure("load"):
            blueprint.load()
        if opened.device_memory.is_planned:  # tuning beside them would leave holes between them
            with phases.measure("weights"):
                jax.block_until_ready(weights.result())
        with phases.measure("compile"):
            blueprint.compile()
        with phases.measure("weights"):  # what is left of them
            parameters = jax.block_until_ready(weights.result())
        gang = Leader(channel) if isinstance(channel, LeaderChannel) else channel
        with phases.measure("kv cache"):
            leader = gang if isinstance(gang, Leader) else None
            runner = ModelRunner(blueprint, parameters, leader)
            own(runner.close)
            jax.block_until_ready(runner.kv)
            runner.programs.compile_rest()
        thread.shutdown()
        stack.pop_all()  # nothing has failed: the channel stays open
    return Started(runner, opened.model, draws.num_compiled, gang)
