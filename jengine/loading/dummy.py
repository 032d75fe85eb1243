"""Random parameters, for work on speed and plumbing that needs a model's shapes but not its
weights.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from jengine.layers.param import DUMMY_STD, ParamInfo
from jengine.loading.arrays import aligned_empty, numpy_dtype

Placed = TypeVar("Placed")  # a parameter where `put` put it: a jax.Array in the engine

CHUNK_ELEMENTS = 1 << 21


def dummy_parameters(
    abstract: Mapping[str, ParamInfo],
    seed: int,
    put: Callable[[str, np.ndarray], Placed],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Placed]:
    """normal(0, 0.02) weights, ones and zeros where declared.

    A parameter depends on `seed` and its path only: not on the other parameters, their order or the
    machine.
    """
    total = sum(info.num_bytes for info in abstract.values())
    done = 0
    parameters = {}
    for path, info in abstract.items():
        parameters[path] = put(path, _draw(path, info, seed))
        done += info.num_bytes
        progress(done, total)
    return parameters


def _draw(path: str, info: ParamInfo, seed: int) -> np.ndarray:
    value = aligned_empty(info.shape, numpy_dtype(info.dtype))
    if info.init != "normal":
        value[...] = 1 if info.init == "ones" else 0
        return value
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    flat = value.reshape(-1)
    for start in range(0, flat.size, CHUNK_ELEMENTS):
        chunk = flat[start : start + CHUNK_ELEMENTS]
        chunk[...] = random.standard_normal(chunk.size, np.float32) * np.float32(DUMMY_STD)
    return value
