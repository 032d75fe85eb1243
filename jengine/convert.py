"""`jengine convert`: a model's weights, read once and written as the engine holds them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from jengine.config import EngineConfig
from jengine.errors import LoadError
from jengine.layers.param import abstract_parameters
from jengine.loading.checkpoint import Checkpoint
from jengine.loading.converted import ConvertedWriter
from jengine.loading.hub import CONFIG_FILES
from jengine.loading.rules import Reader, load_parameters
from jengine.models.loader import open_model
from jengine.text.tokenizer import save_tokenizer


def convert(
    config: EngineConfig, folder: Path, progress: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Write the model of a configuration to a new folder, which any configuration of it loads. No
    device is used, and no more than one layer is in memory. Raises `LoadError`.
    """
    model = open_model(config)
    tensors = model.checkpoint.tensors
    if model.checkpoint.converted is not None:
        raise LoadError(f"{model.checkpoint.name} is converted already")
    if tensors is None:
        raise LoadError("load_format 'dummy' has no weights to convert")
    writer = ConvertedWriter(folder)

    def put(path: str, read: Reader) -> None:
        writer.put(path, read())

    table = type(model.module).weight_table(model.cfg, model.checkpoint.dialect)
    load_parameters(tensors, table, abstract_parameters(model.module), put, progress)
    _write_rest(model.checkpoint, model.cfg.dtype, folder)
    writer.close()


def _write_rest(checkpoint: Checkpoint, dtype: str, folder: Path) -> None:
    """What lies beside weights. The config names the dtype that they have now."""
    hf_config = {k: v for k, v in checkpoint.hf_config.items() if k != "torch_dtype"}
    objects = {
        "config.json": hf_config | {"dtype": dtype},
        "generation_config.json": checkpoint.generation_config,
    }
    if checkpoint.gguf_metadata is not None:
        save_tokenizer(checkpoint.load_tokenizer(), folder)
    else:
        for pattern in CONFIG_FILES:
            for file in checkpoint.path.glob(pattern):
                target = folder / file.relative_to(checkpoint.path)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    for name, value in objects.items():
        if value:
            (folder / name).write_text(json.dumps(value, indent=2), "utf-8")
