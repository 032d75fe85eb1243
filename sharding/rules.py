"""Logical axes -> mesh axes, said once. A `PartitionSpec` is written nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from jax.sharding import PartitionSpec

from jengine.sharding.mesh import MESH_AXES

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class ShardingRules:
    """The mesh axis (or axes, major first) that splits each logical axis; None replicates it.

    The default is tensor parallelism within a layer: what `heads`, `mlp` and `vocab` produce
    stays on its device until the sum over that axis. Where experts are shared out, the ranks that
    share them split everything else as those of `tensor` do.
    """

    tokens: MeshAxes = "data"  # each rank has requests of its own
    embed: MeshAxes = None
    heads: MeshAxes = ("expert", "tensor")
    kv_heads: MeshAxes = ("expert", "tensor")
    head_dim: MeshAxes = None
    mlp: MeshAxes = ("expert", "tensor")
    vocab: MeshAxes = ("expert", "tensor")
    experts: MeshAxes = ("data", "expert")
    expert_mlp: MeshAxes = "tensor"  # the inside of a routed expert
    pages: MeshAxes = None

    def __post_init__(self) -> None:
        for field in fields(self):
            for axis in _as_tuple(getattr(self, field.name)):
                if axis not in MESH_AXES:
                    raise ValueError(
                        f"{field.name}: {axis!r} is no mesh axis; known: {', '.join(MESH_AXES)}"
                    )

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """Mesh axes that split one logical axis; none for an unnamed dimension."""
        if logical is None:
            return ()
        if logical not in self.__dataclass_fields__:
            raise ValueError(f"{logical!r} is no logical axis")
        return _as_tuple(getattr(self, logical))

    def spec(self, logical_axes: Sequence[str | None]) -> PartitionSpec:
        """Raises `ValueError` if two dimensions would be split by the same mesh axis."""
        owner: dict[str, str | None] = {}
        for logical in logical_axes:
            for axis in self.mesh_axes(logical):
                if axis in owner:
                    raise ValueError(
                        f"mesh axis {axis!r} would split both {owner[axis]!r} and {logical!r} "
                        f"of {tuple(logical_axes)}"
                    )
                owner[axis] = logical
        split = [self.mesh_axes(logical) for logical in logical_axes]
        return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in split))


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes
