"""Which part of an array each rank holds.

An array may be several things side by side along a dimension (queries, keys and values of a fused
projection): its sections. Each is cut by itself, so that a rank holds its part of every section. A
section of fewer parts than ranks is copied to neighbours: the heads of keys where they are few.

The `jax.Array` of all ranks is their parts one after another, so that a plain partition of each
dimension gives every rank its own. Where nothing is copied or fused that is the array itself.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jengine.sharding.split import Split

Sections = tuple[tuple[int, ...], ...]  # sizes along each dimension
Rank = TypeVar("Rank", int, jax.Array)
Pieces = tuple[tuple[slice, ...], ...]  # of each dimension of the whole array


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one array is cut: its sections in the whole and on a rank, and the mesh axes that split
    each dimension.
    """

    whole: Sections
    local: Sections
    axes: tuple[tuple[str, ...], ...]
    ways: tuple[int, ...]
    # Of the first dimension, which index of the whole each index of all ranks is, where that does
    # not follow from the sizes: experts in slots.
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = list(zip(self.whole, self.local, self.ways, strict=True))
        if self.order:
            (_, (part,), ways), *sizes = sizes
            if len(self.order) != ways * part:
                raise ValueError(f"{len(self.order)} places, but {ways} ranks have {part} each")
        for whole, local, ways in sizes:
            for size, part in zip(whole, local, strict=True):
                if part > size or ways * part % size:
                    raise ValueError(f"a rank's {local} is no part of {whole} over {ways} ranks")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the `jax.Array` of all ranks."""
        return tuple(n * sum(local) for n, local in zip(self.ways, self.local, strict=True))

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in self.axes))

    def pieces(self, index: tuple[slice, ...]) -> Pieces:
        """Of the whole array, what the ranks hold that `index` of the array of all ranks
        stands for."""
        pieces = []
        for dimension, at in enumerate(index):
            rank = at.start // sum(self.local[dimension])
            parts = self._parts_along(dimension, rank)
            pieces.append(tuple(slice(start, start + part) for start, part in parts))
        return tuple(pieces)

    def part_of(self, whole: jax.Array) -> jax.Array:
        """What this rank holds of an array that every rank has; traced on ranks."""
        for dimension, axes in enumerate(self.axes):
            if axes:
                rank = jax.lax.axis_index(axes)
                parts = [
                    jax.lax.dynamic_slice_in_dim(whole, start, part, dimension)
                    for start, part in self._parts_along(dimension, rank)
                ]
                whole = jnp.concatenate(parts, axis=dimension)
        return whole

    def _parts_along(self, dimension: int, rank: Rank) -> Iterator[tuple[Rank, int]]:
        """(start in the whole, size) of a rank's part of each section."""
        if self.order and dimension == 0:
            (part,) = self.local[0]
            order: Any = self.order if isinstance(rank, int) else jnp.asarray(self.order, jnp.int32)
            yield from ((order[rank * part + i], 1) for i in range(part))
            return
        first, ways = 0, self.ways[dimension]
        for size, part in zip(self.whole[dimension], self.local[dimension], strict=True):
            copies = ways * part // size
            yield first + rank // copies * part, part
            first += size


def cut_array(
    split: Split,
    logical_axes: tuple[str | None, ...],
    whole: Sections,
    local: Sections,
    order: tuple[int, ...] = (),
) -> Cut:
    """`local` is what a rank declares where the whole model declares `whole`; `order`: see `Cut`.
    Raises `ValueError` if two dimensions would be split by the same mesh axis, or a rank's is no
    part.
    """
    split.rules.spec(logical_axes)
    axes = tuple(split.axes(name) for name in logical_axes)
    return Cut(whole, local, axes, tuple(split.ways(name) for name in logical_axes), order)
