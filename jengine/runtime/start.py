"""How a runner starts: devices, model, programs and parameters, as far as possible at once."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax

from jengine.cluster import Cluster
from jengine.config import EngineConfig
from jengine.distributed.channel import FollowerChannel, LeaderChannel
from jengine.models.loader import ModelDefinition, load_parameters, open_model
from jengine.runtime.blueprint import draw_blueprint, dummy_compiler, keep_jax_cache, open_artifacts
from jengine.runtime.gang import Leader, meet
from jengine.runtime.memory import open_devices
from jengine.runtime.phases import Phases
from jengine.runtime.runner import ModelRunner
from jengine.sharding.placement import Placement


@dataclasses.dataclass(frozen=True)
class Started:
    """A runner that can serve, and what else its start brought."""

    runner: ModelRunner
    model: ModelDefinition
    num_drawn: int  # programs compiled to draw dummy parameters
    channel: LeaderChannel | FollowerChannel | None  # of a gang
    leader: Leader | None


def start_runner(
    config: EngineConfig,
    phases: Phases,
    own: Callable[[Callable[[], None]], None],
    cluster: Cluster | None = None,
) -> Started:
    """Load the model and prepare executables. `own` is told how to close what there is so far.

    Parameters arrive while executables are made ready; the KV cache comes last, since tuning needs
    memory. `cluster`: the processes that run this engine together; they meet before any of them
    takes the time to load.
    """
    with phases.measure("device"):
        devices, device_memory = open_devices(config.cache, config.parallel.num_ranks)
    with phases.measure("model"):
        model = open_model(config)
        placement = Placement(model.split, devices)
        artifacts = open_artifacts(config, placement)
        keep_jax_cache(artifacts)
    draws = dummy_compiler(artifacts, model.split)
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as thread:
        weights = thread.submit(load_parameters, model, placement, draws)
        with phases.measure("plan"):
            blueprint = draw_blueprint(config, model, placement, device_memory, artifacts)
            own(blueprint.programs.close)
        channel = None if cluster is None else meet(cluster, config, blueprint)
        with phases.measure("load"):
            blueprint.load()
        if device_memory.is_planned:  # tuning beside them would leave holes between them
            with phases.measure("weights"):
                jax.block_until_ready(weights.result())
        with phases.measure("compile"):
            blueprint.compile()
        with phases.measure("weights"):  # what is left of them
            parameters = jax.block_until_ready(weights.result())
    leader = Leader(channel) if isinstance(channel, LeaderChannel) else None
    with phases.measure("kv cache"):
        runner = ModelRunner(blueprint, parameters, leader)
        own(runner.close)
        jax.block_until_ready(runner.kv)
        runner.programs.compile_rest()
    return Started(runner, model, draws.num_compiled, channel, leader)
