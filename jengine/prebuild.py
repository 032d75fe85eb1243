"""`jengine prebuild`: everything that a start would compile, ahead of time. No parameter is read,
and no KV cache is made.
"""

import dataclasses

from jengine.config import EngineConfig
from jengine.layers.param import abstract_parameters
from jengine.loading.dummy import dummy_programs
from jengine.models.loader import open_model
from jengine.runtime.blueprint import (
    device_placement,
    draw_blueprint,
    dummy_compiler,
    open_artifacts,
)
from jengine.runtime.memory import open_device
from jengine.runtime.programs import Prepared


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
    device, device_memory = open_device(config.cache)
    model = open_model(config)
    artifacts = open_artifacts(config, device)
    if model.checkpoint.tensors is None:
        infos = abstract_parameters(model.module).values()
        dummy_programs(infos, device_placement(device), dummy_compiler(artifacts))
    blueprint = draw_blueprint(config, model, device, device_memory, artifacts)
    blueprint.load()
    blueprint.compile()
    executables = list(blueprint.programs.prepared.values())
    return Prebuilt(str(artifacts.toolchain), blueprint.num_pages, executables)
