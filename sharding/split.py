"""How a model is cut over ranks: the sizes of the mesh, and the rules. Needs no device."""

import dataclasses
import math

from jengine.sharding.rules import ShardingRules


@dataclasses.dataclass(frozen=True)
class Split:
    """The sizes of the mesh axes, and what each of them splits. All ones: nothing is split."""

    data: int = 1
    expert: int = 1
    tensor: int = 1
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)

    @property
    def num_ranks(self) -> int:
        return self.data * self.expert * self.tensor

    def axes(self, *logical: str | None) -> tuple[str, ...]:
        """Mesh axes of more than one rank that split these logical axes, major first."""
        names = (axis for name in logical for axis in self.rules.mesh_axes(name))
        return tuple(axis for axis in dict.fromkeys(names) if getattr(self, axis) > 1)

    def ways(self, *logical: str | None) -> int:
        """Over how many ranks these logical axes are split together."""
        return math.prod(getattr(self, axis) for axis in self.axes(*logical))

    def without(self, logical: str) -> "Split":
        """The same with one logical axis whole on every rank."""
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, **{logical: None}))

    def share(self, size: int, logical: str, field: str) -> int:
        """A rank's part of `size`. Raises `ValueError` naming the config's `field` if it does not
        divide.
        """
        ways = self.ways(logical)
        if size % ways:
            raise ValueError(f"{field} ({size}) does not divide over {ways} ranks")
        return size // ways

    def share_or_copy(self, size: int, logical: str, field: str) -> int:
        """As `share`; where there are more ranks than parts, neighbours hold copies of one part."""
        ways = self.ways(logical)
        if size % ways and ways % size:
            raise ValueError(
                f"{field} ({size}) neither divides over {ways} ranks nor divides their number"
            )
        return max(1, size // ways)
