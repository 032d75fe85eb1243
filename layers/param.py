"""Parameters declared once: shape, dtype, logical axes and initialiser, from which everything else
is derived.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.pallas_kernels.packed import PackedWeight, Packing

# columns: an index along the last axis; the last four: those of packed weights of size DUMMY_STD
Initializer = Literal[
    "normal", "ones", "zeros", "columns", "e2m1", "e4m3", "scales of e2m1", "scales of e4m3"
]
Size = int | tuple[int, ...]
DUMMY_STD = 0.02


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """What a parameter is, before it has a value. `logical_axes` names each dimension (see
    `sharding/rules.py`); `sections` are the sizes of what lies side by side along it, by default
    one thing. What a rank holds of the last dimension is a multiple of `unit`.
    """

    shape: tuple[int, ...]
    dtype: str
    logical_axes: tuple[str | None, ...]
    init: Initializer = "normal"
    sections: tuple[tuple[int, ...], ...] = ()
    unit: int = 1

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
    unit: int = 1,
) -> nnx.Param:
    """Declare a parameter of a module. Its value is abstract until a loader fills it.

    A dimension of several things side by side is the tuple of their sizes: ranks cut each, and the
    last one in multiples of `unit`.
    """
    sections = tuple(size if isinstance(size, tuple) else (size,) for size in shape)
    whole = tuple(map(sum, sections))
    info = ParamInfo(whole, dtype, logical_axes, init, sections, unit)
    return nnx.Param(jax.ShapeDtypeStruct(whole, jnp.dtype(dtype)), info=info)


class PackedParam(nnx.Module):
    """The two parameters of a packed weight. `[...]` gives the weight, as of an `nnx.Param`."""

    def __init__(
        self, shape: tuple[Size, ...], logical_axes: tuple[str | None, ...], packing: Packing
    ) -> None:
        *rows, depth = shape
        if not isinstance(depth, int):
            raise ValueError(f"a packed weight of several things {depth} along its inputs")
        self.packing = packing
        self.codes = param(
            (*rows, packing.num_bytes(depth)),
            logical_axes,
            "uint8",
            packing.codes,
            unit=packing.num_bytes(packing.group),
        )
        self.scales = param(
            (*rows, packing.num_groups(depth)),
            logical_axes,
            packing.scale_dtype,
            "scales of e2m1" if packing.codes == "e2m1" else "scales of e4m3",
        )

    def __getitem__(self, index: Any) -> PackedWeight:
        return PackedWeight(self.codes[index], self.scales[index], self.packing)


def weight_param(
    shape: tuple[Size, ...],
    logical_axes: tuple[str | None, ...],
    dtype: str,
    packing: Packing | None = None,
) -> nnx.Param | PackedParam:
    """Declare a weight [..., out, in]: in `dtype`, or packed."""
    if packing is None:
        return param(shape, logical_axes, dtype)
    return PackedParam(shape, logical_axes, packing)


def abstract_parameters(model: nnx.Module) -> Mapping[str, ParamInfo]:
    """Dotted path -> `ParamInfo` of every parameter of a module built by `param`, in a stable
    order.
    """
    state = nnx.state(model, nnx.Param)
    return {
        ".".join(map(str, path)): leaf.get_metadata("info")
        for path, leaf in nnx.to_flat_state(state)
    }
