"""The device mesh: three named axes, always all three, so that rules never ask which exist."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

MESH_AXES = ("data", "expert", "tensor")


def make_mesh(
    *,
    data: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Arrange the first `data * expert * tensor` of `devices` (default: all) as a mesh.

    Raises `ValueError` if a size is below one or there are too few devices.
    """
    sizes = dict(zip(MESH_AXES, (data, expert, tensor), strict=True))
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"mesh axis {name} must be >= 1, got {size}")
    available = list(jax.devices() if devices is None else devices)
    needed = data * expert * tensor
    if needed > len(available):
        raise ValueError(f"a mesh of {sizes} needs {needed} devices, {len(available)} are there")
    # Auto: the compiler propagates shardings from parameters and inputs; nothing is typed by axis.
    return jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=available[:needed],
    )
