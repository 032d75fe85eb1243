"""`jengine prebuild`: everything that a start would compile, ahead of time. No parameter is read,
and no KV cache is made.
"""

import dataclasses

from jengine.config import EngineConfig
from jengine.layers.param import abstract_parameters
from jengine.loading.dummy import dummy_programs
from jengine.models.loader import open_model
from jengine.runtime.blueprint import (
    draw_blueprint,
    dummy_compiler,
    open_artifacts,
)
from jengine.runtime.memory import open_devices
from jengine.runtime.programs import Prepared
from jengine.sharding.placement import Placement


@dataclasses.dataclass(frozen=True)
class Prebuilt:
    """What lies in `folder` now, and how many pages of KV cache it is for."""

    folder: str
    num_pages: tuple[int, ...]
    executables: list[Prepared]


def prebuild(config: EngineConfig) -> Prebuilt:
    """Compile every executable that an engine of this configuration loads on this machine, and wait
    for them. What is there already is kept.
    """
    compile_config = dataclasses.replace(
        config.compile, background_compile=False, keep_executables=True
    )
    config = dataclasses.replace(config, compile=compile_config)
    devices, device_memory = open_devices(config.cache, config.parallel.num_ranks)
    model = open_model(config)
    placement = Placement(model.split, devices)
    artifacts = open_artifacts(config, placement)
    if model.checkpoint.tensors is None:
        draws = dummy_compiler(artifacts, model.split)
        dummy_programs(abstract_parameters(model.module), placement, draws, model.cuts)
    blueprint = draw_blueprint(config, model, placement, device_memory, artifacts)
    blueprint.load()
    blueprint.compile()
    executables = list(blueprint.programs.prepared.values())
    return Prebuilt(str(artifacts.toolchain), blueprint.num_pages, executables)
