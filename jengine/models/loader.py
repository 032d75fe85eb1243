"""From model arguments to a module with its parameters on the device."""

import dataclasses
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jengine.config import EngineConfig
from jengine.errors import LoadError
from jengine.layers.param import abstract_parameters
from jengine.loading.checkpoint import Checkpoint, open_checkpoint
from jengine.loading.dummy import Compile, compile_here, dummy_parameters
from jengine.loading.rules import load_parameters as load_checkpoint
from jengine.models.registry import resolve_architecture
from jengine.pallas_kernels.kv_write.api import is_in_place

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """An opened model whose parameters are not read: an abstract module, and where they are."""

    checkpoint: Checkpoint
    architecture: str
    cfg: Any  # the family's frozen config
    module: Any  # nnx.Module; holds no arrays
    max_model_len: int
    seed: int  # of dummy parameters


def open_model(config: EngineConfig) -> ModelDefinition:
    """Open the checkpoint and declare the module."""
    checkpoint = open_checkpoint(config.model)
    hf = checkpoint.hf_config
    architecture, model_class = resolve_architecture(hf)
    max_model_len = resolve_max_model_len(
        hf,
        config.model.max_model_len,
        positions_are_scaled=model_class.config_class.positions_are_scaled,
    )
    dtype = resolve_dtype(hf, config.model.dtype)
    kv_dtype = resolve_kv_dtype(dtype, config.cache.kv_cache_dtype)
    cfg = model_class.config_class.from_hf(
        hf, dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len
    )
    return ModelDefinition(
        checkpoint, architecture, cfg, model_class(cfg), max_model_len, config.model.seed
    )


def load_parameters(
    model: ModelDefinition,
    placement: jax.sharding.Sharding,
    compile_: Compile = compile_here,
) -> dict[str, jax.Array]:
    """Read, or draw, the parameters onto the device, by path. They may still be on their way."""
    started = time.perf_counter()
    abstract = abstract_parameters(model.module)
    with tqdm(desc="weights", unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        def put(path: str, value: np.ndarray) -> jax.Array:
            del path
            return jax.device_put(value, placement)

        tensors = model.checkpoint.tensors
        if tensors is None:
            parameters = dummy_parameters(abstract, model.seed, placement, compile_, progress)
        else:
            table = type(model.module).weight_table(model.cfg, model.checkpoint.dialect)
            parameters = load_checkpoint(tensors, table, abstract, put, progress)
    log.info("%s loaded in %.1f s", model.architecture, time.perf_counter() - started)
    return parameters


def resolve_max_model_len(
    hf: dict[str, Any], asked: int | None, *, positions_are_scaled: bool
) -> int:
    """The model's own limit, or a smaller one that was asked for. `positions_are_scaled`: see
    `DecoderConfig`.
    """
    limit = int(hf.get("max_position_embeddings") or 2048)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    is_factor = kind in ("linear", "dynamic", "yarn") and not positions_are_scaled
    if is_factor and "original_max_position_embeddings" not in rope:
        limit = int(limit * float(rope.get("factor", 1.0)))
    if asked is None:
        return limit
    if not 1 <= asked <= limit:
        raise LoadError(f"max_model_len {asked} is outside what the model supports (1 to {limit})")
    return asked


def resolve_kv_dtype(dtype: str, asked: str) -> str:
    """For "auto" the model's dtype, unless this back end copies such pages on every write."""
    if asked != "auto":
        return asked
    return dtype if is_in_place(dtype) else "float32"


def resolve_dtype(hf: dict[str, Any], asked: str) -> str:
    """For "auto" the checkpoint's own dtype; bfloat16 for quantised files and float16 weights."""
    if asked == "auto":
        asked = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16")
        asked = "bfloat16" if asked == "float16" else asked
    if asked not in DTYPES:
        raise LoadError(f"dtype {asked!r} is not supported; known: {', '.join(DTYPES)}")
    return str(jnp.dtype(asked))
