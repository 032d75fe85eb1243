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
from jengine.loading.dummy import dummy_parameters
from jengine.loading.rules import load_parameters
from jengine.models.registry import resolve_architecture
from jengine.pallas_kernels.kv_write.api import is_in_place

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """An abstract module (declarations only) and its parameters by path."""

    checkpoint: Checkpoint
    architecture: str
    cfg: Any  # the family's frozen config
    module: Any  # nnx.Module; holds no arrays
    parameters: dict[str, jax.Array]
    max_model_len: int


def load_model(config: EngineConfig, device: jax.Device) -> LoadedModel:
    """Open the checkpoint, declare the module, read its parameters onto `device`."""
    started = time.perf_counter()
    checkpoint = open_checkpoint(config.model)
    hf = checkpoint.hf_config
    architecture, model_class = resolve_architecture(hf)
    max_model_len = resolve_max_model_len(hf, config.model.max_model_len)
    dtype = resolve_dtype(hf, config.model.dtype)
    kv_dtype = resolve_kv_dtype(dtype, config.cache.kv_cache_dtype)
    cfg = model_class.config_class.from_hf(
        hf, dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len
    )
    module = model_class(cfg)
    abstract = abstract_parameters(module)

    def put(path: str, value: np.ndarray) -> jax.Array:
        del path
        return jax.device_put(value, device)

    with tqdm(desc="weights", unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if checkpoint.tensors is None:
            parameters = dummy_parameters(abstract, config.model.seed, put, progress)
        else:
            table = model_class.weight_table(cfg, checkpoint.dialect)
            parameters = load_parameters(checkpoint.tensors, table, abstract, put, progress)
    log.info("%s loaded in %.1f s", architecture, time.perf_counter() - started)
    return LoadedModel(checkpoint, architecture, cfg, module, parameters, max_model_len)


def resolve_max_model_len(hf: dict[str, Any], asked: int | None) -> int:
    """The model's own limit, or a smaller one that was asked for."""
    limit = int(hf.get("max_position_embeddings") or 2048)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("linear", "dynamic", "yarn") and "original_max_position_embeddings" not in rope:
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
