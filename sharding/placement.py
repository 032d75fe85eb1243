"""Where the arrays of an engine live, and how its programs run there: on one device, or on every
rank of a mesh.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jengine.sharding import collectives
from jengine.sharding.cut import Cut, Pieces
from jengine.sharding.mesh import MESH_AXES, make_mesh
from jengine.sharding.split import Split


@dataclass(frozen=True)
class Placement:
    """The devices of an engine, one for each rank of `split`."""

    split: Split
    devices: tuple[jax.Device, ...]

    @property
    def device(self) -> jax.Device:
        """One that stands for all: they are of a kind."""
        return self.devices[0]

    @property
    def num_ranks(self) -> int:
        return self.split.num_ranks

    @functools.cached_property
    def mesh(self) -> Mesh:
        sizes = {axis: getattr(self.split, axis) for axis in MESH_AXES}
        return make_mesh(**sizes, devices=self.devices)

    @property
    def replicated(self) -> Sharding:
        """Of what every rank holds whole."""
        return self._sharding(PartitionSpec())

    @property
    def per_rank(self) -> Sharding:
        """Of the arrays of all ranks one after another along their first dimension."""
        return self._sharding(PartitionSpec(MESH_AXES))

    @property
    def per_data_rank(self) -> Sharding:
        """Of what differs between ranks that serve other requests: the arrays of them one after
        another along their first dimension.
        """
        return self._sharding(PartitionSpec("data"))

    @property
    def is_one_device(self) -> bool:
        return self.num_ranks == 1

    def of_data_rank(self, tree: Any, rank: int) -> Any:
        """Arrays of one device, which every rank of those that serve `rank`'s requests holds."""
        device = self.mesh.devices[rank, 0, 0]

        def shard(array: jax.Array) -> jax.Array:
            return next(s.data for s in array.addressable_shards if s.device == device)

        return jax.tree.map(shard, tree)

    def zeros_per_data_rank(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Every process makes its own: putting an array would compare theirs in a collective."""
        zeros = np.zeros(shape, dtype)
        return jax.make_array_from_callback(shape, self.per_data_rank, lambda at: zeros[at])

    def same_on_all(self, value: np.ndarray) -> jax.Array:
        """What every rank holds whole; as above, every process puts its own."""
        return jax.make_array_from_callback(value.shape, self.replicated, lambda at: value[at])

    def of(self, cut: Cut) -> Sharding:
        return self._sharding(cut.spec)

    def on_ranks(self, function: Callable[..., Any], arguments: Any, result: Any) -> Any:
        """The program that runs `function` on every rank, over its parts of the arguments.

        `arguments` and `result` are trees (or prefixes of such) whose leaves may have a sharding.
        Arguments without are the same on all ranks, results without are per data rank. On one
        device it is `function` itself.
        """
        if self.num_ranks == 1:
            return function

        @functools.wraps(function)
        def on_rank(*args: Any) -> Any:
            with collectives.tracing_for(self.split):
                return function(*args)

        return jax.shard_map(
            on_rank,
            mesh=self.mesh,
            in_specs=jax.tree.map(lambda x: _spec(x, PartitionSpec()), tuple(arguments)),
            out_specs=jax.tree.map(lambda x: _spec(x, PartitionSpec("data")), result),
            check_vma=False,  # kernels are opaque: nobody can tell what varies
        )

    def place(self, cut: Cut, read: Callable[[Pieces], np.ndarray]) -> jax.Array:
        """An array of which `read` gives pieces: each rank's once, one at a time."""
        sharding = self.of(cut)
        placed: dict[jax.Device, jax.Array] = {}
        wanted: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        indices = sharding.addressable_devices_indices_map(cut.shape)
        for device, index in indices.items():
            key = tuple(at.indices(n)[:2] for at, n in zip(index or (), cut.shape, strict=True))
            wanted.setdefault(key, []).append(device)
        for key, devices in wanted.items():
            value = read(cut.pieces(tuple(slice(*bounds) for bounds in key)))
            for device in devices:
                placed[device] = jax.device_put(value, device)
            del value  # else it would still be alive while the next is read
        arrays = [placed[device] for device in indices]
        return jax.make_array_from_single_device_arrays(cut.shape, sharding, arrays)

    def _sharding(self, spec: PartitionSpec) -> Sharding:
        if self.num_ranks == 1:
            return SingleDeviceSharding(self.device)
        return NamedSharding(self.mesh, spec)


def _spec(leaf: Any, default: PartitionSpec) -> PartitionSpec:
    sharding = getattr(leaf, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else default
