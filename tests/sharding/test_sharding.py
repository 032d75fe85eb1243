"""Rules reject what cannot be placed; what is cut goes to the ranks as said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jengine.sharding import collectives
from jengine.sharding.cut import Pieces, cut_array
from jengine.sharding.mesh import MESH_AXES, make_mesh
from jengine.sharding.placement import Placement
from jengine.sharding.rules import ShardingRules
from jengine.sharding.split import Split


def test_default_mesh_is_one_device_with_all_axes() -> None:
    mesh = make_mesh()
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.ravel().tolist() == [jax.devices()[0]]


@pytest.mark.parametrize(
    ("logical", "expected"),
    [
        (("mlp", "embed"), PartitionSpec(("expert", "tensor"), None)),
        (("embed", "heads"), PartitionSpec(None, ("expert", "tensor"))),
        (("experts", "expert_mlp", "embed"), PartitionSpec(("data", "expert"), "tensor", None)),
        ((), PartitionSpec()),
    ],
)
def test_spec_of_the_default_rules(
    logical: tuple[str | None, ...], expected: PartitionSpec
) -> None:
    assert ShardingRules().spec(logical) == expected


def test_collision_names_both_dimensions() -> None:
    with pytest.raises(ValueError, match=r"'expert'.*'heads'.*'mlp'"):
        ShardingRules().spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="'expert'"):
        cut_array(Split(expert=2), ("experts", "vocab"), ((4,), (4,)), ((2,), (2,)))


def test_unknown_names_are_rejected() -> None:
    with pytest.raises(ValueError, match="no mesh axis"):
        ShardingRules(mlp="model")
    with pytest.raises(ValueError, match="no logical axis"):
        ShardingRules().spec(("width",))


def test_mesh_needs_enough_devices() -> None:
    with pytest.raises(ValueError, match="needs 1000 devices"):
        make_mesh(tensor=1000)
    with pytest.raises(ValueError, match="tensor must be >= 1"):
        make_mesh(tensor=0)


def test_sizes_that_do_not_divide_are_named() -> None:
    split = Split(expert=2, tensor=2)
    assert (split.share(12, "mlp", "m"), split.share(6, "experts", "e")) == (3, 3)
    assert [split.share_or_copy(n, "heads", "k") for n in (8, 4, 2, 1)] == [2, 1, 1, 1]
    with pytest.raises(ValueError, match=r"width \(6\) does not divide over 4 ranks"):
        split.share(6, "mlp", "width")
    with pytest.raises(ValueError, match=r"kv \(3\) neither"):
        split.share_or_copy(3, "heads", "kv")
    assert split.without("mlp").share(6, "mlp", "width") == 6


@pytest.mark.multi_device
def test_sections_are_cut_one_by_one_and_few_heads_are_copied() -> None:
    """Four ranks of a fused projection: eight rows of queries, two heads of keys of three rows."""
    split = Split(expert=2, tensor=2)
    placement = Placement(split, tuple(jax.devices()[:4]))
    cut = cut_array(split, ("heads", "embed"), ((8, 6), (5,)), ((2, 3), (5,)))
    assert cut.shape == (20, 5)
    whole = np.arange(14 * 5, dtype=np.float32).reshape(14, 5)
    reads: list[Pieces] = []

    def read(pieces: Pieces) -> np.ndarray:
        reads.append(pieces)
        return whole[np.r_[pieces[0]]]

    placed = placement.place(cut, read)
    assert len(reads) == 4
    rows = [[0, 1, 8, 9, 10], [2, 3, 8, 9, 10], [4, 5, 11, 12, 13], [6, 7, 11, 12, 13]]
    for rank, shard in enumerate(placed.addressable_shards):
        assert shard.device == placement.devices[rank]
        np.testing.assert_array_equal(shard.data, whole[rows[rank]])
    drawn = jax.jit(placement.on_ranks(cut.part_of, (0,), placed))(whole)
    np.testing.assert_array_equal(drawn, placed)
    with pytest.raises(ValueError, match="no part"):
        cut_array(split, ("heads", "embed"), ((8, 6), (5,)), ((2, 4), (5,)))


@pytest.mark.multi_device
def test_what_no_axis_splits_is_read_once_for_all() -> None:
    split = Split(expert=2, tensor=2)
    placement = Placement(split, tuple(jax.devices()[:4]))
    cut = cut_array(split, ("experts", None), ((4,), (3,)), ((2,), (3,)))
    whole = np.arange(12, dtype=np.float32).reshape(4, 3)
    reads: list[Pieces] = []

    def read(pieces: Pieces) -> np.ndarray:
        reads.append(pieces)
        return whole[pieces[0][0]]

    np.testing.assert_array_equal(placement.place(cut, read), whole)
    assert reads == [((slice(0, 2),), (slice(0, 3),)), ((slice(2, 4),), (slice(0, 3),))]


@pytest.mark.multi_device
def test_collectives_follow_logical_axes() -> None:
    split = Split(expert=2, tensor=2)
    placement = Placement(split, tuple(jax.devices()[:4]))

    def program(x: jax.Array) -> tuple[jax.Array, ...]:
        rank = collectives.rank_in("heads").astype(x.dtype)
        mine = x + rank
        return (
            collectives.sum_over(mine, "experts", "expert_mlp"),
            collectives.sum_over(mine, "embed"),
            collectives.mean_over(mine, "heads"),
            collectives.sum_over(collectives.once_over(x, "heads"), "heads"),
            collectives.gather_over(mine, "heads", 0),
        )

    x = jnp.float32([10])
    assert not collectives.are_split_together("tokens", "experts")
    results = jax.jit(placement.on_ranks(program, (0,), 0))(x)
    got = [np.asarray(result).tolist() for result in results]
    assert got == [[46], [10], [11.5], [10], [10, 11, 12, 13]]
    assert [np.asarray(r).tolist() for r in program(x)] == [[10]] * 5  # on one device


@pytest.mark.multi_device
def test_sums_keep_to_ranks_of_the_same_tokens() -> None:
    """Two data ranks of two: what others know of their tokens is gathered and scattered."""
    split = Split(data=2, expert=2)
    placement = Placement(split, tuple(jax.devices()[:4]))

    def program(x_TD: jax.Array) -> tuple[jax.Array, ...]:
        assert collectives.are_split_together("tokens", "experts")
        assert (collectives.ways("experts"), split.ways("experts")) == (2, 4)
        mine = x_TD + collectives.rank_in("experts").astype(x_TD.dtype)
        everyone = collectives.gather_over(mine, "tokens", 0)
        return collectives.sum_over(mine, "experts"), collectives.scatter_over(everyone, "tokens")

    x = jax.device_put(np.array([[10.0], [20.0]], np.float32), placement.per_data_rank)
    summed, scattered = jax.jit(placement.on_ranks(program, (x,), 0))(x)
    # Ranks 0 and 1 have 10 + 0 and 10 + 1, ranks 2 and 3 have 20 + 2 and 20 + 3.
    assert np.asarray(summed).ravel().tolist() == [21, 45]
    # Summed over data ranks only; shown is what the first rank of each has.
    own = [placement.of_data_rank(scattered, rank) for rank in range(2)]
    assert [np.asarray(part).tolist() for part in own] == [[[20.0]], [[44.0]]]
