"""What DeepSeek-V4 keeps of a request, and which caches belong to which layer.

Every layer has a window of single tokens. One that compresses has entries besides, each for
several tokens, with the indexer's key behind it where there is an indexer; and the state of its
compressors, whose softmax over the group at hand is unfinished.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jengine.kv_spec import KVKind, KVSpec
from jengine.models.deepseek_v4.compressor import num_halves
from jengine.models.deepseek_v4.config import Compression, DeepseekV4Config
from jengine.pallas_kernels.compress_tokens import state_size


@dataclass(frozen=True)
class LayerCaches:
    """Indices into the caches of the model."""

    window: int
    entries: int = -1  # of layers that compress
    state: int = -1


def layer_caches(cfg: DeepseekV4Config) -> list[LayerCaches]:
    """Of each layer. Entries come first: they are what grows, and the first group's pages are what
    a number of pages counts."""
    compressing = [layer for layer, c in enumerate(cfg.compressions) if c is not None]
    first_window, num_layers = len(compressing), len(cfg.compressions)
    caches = [LayerCaches(first_window + layer) for layer in range(num_layers)]
    for nth, layer in enumerate(compressing):
        caches[layer] = LayerCaches(first_window + layer, nth, first_window + num_layers + nth)
    return caches


def cache_specs(cfg: DeepseekV4Config) -> tuple[KVSpec, ...]:
    """In the order that `layer_caches` counts."""
    compressions = [c for c in cfg.compressions if c is not None]
    entries = [
        KVSpec(
            KVKind.MLA,
            (entry_dim(cfg, c),),
            cfg.kv_dtype,
            _itemsize(cfg),
            tokens_per_entry=c.ratio,
        )
        for c in compressions
    ]
    states = [
        KVSpec(KVKind.STATE, (state_size(num_halves(c), entry_dim(cfg, c)),), "float32", 4)
        for c in compressions
    ]
    return (*entries, *[window_spec(cfg)] * len(cfg.compressions), *states)


def window_spec(cfg: DeepseekV4Config) -> KVSpec:
    shape, window = (cfg.head_dim,), cfg.sliding_window
    return KVSpec(KVKind.SLIDING_WINDOW, shape, cfg.kv_dtype, _itemsize(cfg), window)


def entry_dim(cfg: DeepseekV4Config, compression: Compression) -> int:
    """With the index key, which lies behind an entry where there is an indexer."""
    return cfg.head_dim + (cfg.index.head_dim if compression.is_sparse else 0)


def _itemsize(cfg: DeepseekV4Config) -> int:
    return np.dtype(jnp.dtype(cfg.kv_dtype)).itemsize
