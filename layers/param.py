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
Size = int | tuple[int, ...]
DUMMY_STD = 0.02


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """What a parameter is, before it has a value. `logical_axes` names each dimension (see
    `sharding/rules.py`); `sections` are the sizes of what lies side by side along it, by default
    one thing.
    """

    shape: tuple[int, ...]
    dtype: str
    logical_axes: tuple[str | None, ...]
    init: Initializer = "normal"
    sections: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.logical_axes):
            raise ValueError(
                f"{len(self.shape)} dimensions but {len(self.logical_axes)} logical axes"
            )
        if not self.sections:
            object.__setattr__(self, "sections", tuple((size,) for size in self.shape))
        if tuple(map(sum, self.sections)) != self.shape:
            raise ValueError(f"sections {self.sections} do not make up {self.shape}")

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def param(
    shape: tuple[Size, ...],
    logical_axes: tuple[str | None, ...],
    dtype: str,
    init: Initializer = "normal",
) -> nnx.Param:
    """Declare a parameter of a module. Its value is abstract until a loader fills it.

    A dimension of several things side by side is the tuple of their sizes: ranks cut each.
    """
    sections = tuple(size if isinstance(size, tuple) else (size,) for size in shape)
    whole = tuple(map(sum, sections))
    info = ParamInfo(whole, dtype, logical_axes, init, sections)
    return nnx.Param(jax.ShapeDtypeStruct(whole, jnp.dtype(dtype)), info=info)


def abstract_parameters(model: nnx.Module) -> Mapping[str, ParamInfo]:
    """Dotted path -> `ParamInfo` of every parameter of a module built by `param`, in a stable
    order.
    """
    state = nnx.state(model, nnx.Param)
    return {
        ".".join(map(str, path)): leaf.get_metadata("info")
        for path, leaf in nnx.to_flat_state(state)
    }
