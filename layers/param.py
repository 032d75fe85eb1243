"""Parameters declared once: shape, dtype, logical axes and initialiser, from which everything else
is derived.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Literal["normal", "ones", "zeros", "columns"]  # columns: an index along the last axis
DUMMY_STD = 0.02


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """What a parameter is, before it has a value. `logical_axes` names each dimension (see
    `sharding/rules.py`).
    """

    shape: tuple[int, ...]
    dtype: str
    logical_axes: tuple[str | None, ...]
    init: Initializer = "normal"

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.logical_axes):
            raise ValueError(
                f"{len(self.shape)} dimensions but {len(self.logical_axes)} logical axes"
            )

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def param(
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    dtype: str,
    init: Initializer = "normal",
) -> nnx.Param:
    """Declare a parameter of a module. Its value is abstract until a loader fills it."""
    info = ParamInfo(shape, dtype, logical_axes, init)
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), info=info)


def abstract_parameters(model: nnx.Module) -> Mapping[str, ParamInfo]:
    """Dotted path -> `ParamInfo` of every parameter of a module built by `param`, in a stable
    order.
    """
    state = nnx.state(model, nnx.Param)
    return {
        ".".join(map(str, path)): leaf.get_metadata("info")
        for path, leaf in nnx.to_flat_state(state)
    }
