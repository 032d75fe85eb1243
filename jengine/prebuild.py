"""`jengine prebuild`: everything that a start would compile, ahead of time. No parameter is read,
and no KV cache is made.
"""

import dataclasses

from jengine.config import EngineConfig
from jengine.layers.param import abstract_parameters
from jengine.loading.dummy import dummy_programs
from jengine.runtime.blueprint import dummy_compiler
from jengine.runtime.programs import Prepared
from jengine.runtime.start import open_engine


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
    opened = open_engine(config)
    model, artifacts = opened.model, opened.artifacts
    if model.checkpoint.dialect == "dummy":
        draws = dummy_compiler(artifacts, model.split)
        dummy_programs(abstract_parameters(model.module), opened.placement, draws, model.cuts)
    blueprint = opened.draw()
    blueprint.load()
    blueprint.compile()
    executables = list(blueprint.programs.prepared.values())
    return Prebuilt(str(artifacts.toolchain), blueprint.num_pages, executables)
