"""Rules reject what cannot be placed, and what they place is split as said."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jengine.sharding.mesh import MESH_AXES, make_mesh
from jengine.sharding.rules import ShardingRules, named_sharding


def test_default_mesh_is_one_device_with_all_axes() -> None:
    mesh = make_mesh()
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.ravel().tolist() == [jax.devices()[0]]


@pytest.mark.parametrize(
    ("logical", "expected"),
    [
        (("mlp", "embed"), PartitionSpec("tensor", None)),
        (("embed", "heads"), PartitionSpec(None, "tensor")),
        (("experts", "mlp", "embed"), PartitionSpec("expert", "tensor", None)),
        (
            ("pages", None, None, "kv_heads", "head_dim"),
            PartitionSpec(None, None, None, "tensor", None),
        ),
        ((), PartitionSpec()),
    ],
)
def test_spec_of_the_default_rules(
    logical: tuple[str | None, ...], expected: PartitionSpec
) -> None:
    assert ShardingRules().spec(logical) == expected


def test_two_mesh_axes_split_one_dimension() -> None:
    rules = ShardingRules(vocab=("expert", "tensor"))
    assert rules.spec(("vocab", "embed")) == PartitionSpec(("expert", "tensor"), None)


def test_collision_names_both_dimensions() -> None:
    with pytest.raises(ValueError, match=r"'tensor'.*'heads'.*'mlp'"):
        ShardingRules().spec(("heads", "mlp"))


def test_collision_within_tuples() -> None:
    with pytest.raises(ValueError, match="'expert'"):
        ShardingRules(vocab=("expert", "tensor")).spec(("experts", "vocab"))


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


@pytest.mark.multi_device
def test_placed_array_is_split_as_the_rules_say() -> None:
    mesh = make_mesh(expert=2, tensor=4)
    x = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    placed = jax.device_put(x, named_sharding(mesh, ShardingRules(), x.shape, ("mlp", "embed")))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 6)}
    rows_of_tensor_1 = placed.addressable_shards[1].data
    np.testing.assert_array_equal(rows_of_tensor_1, x[2:4])


@pytest.mark.multi_device
def test_uneven_dimension_is_named() -> None:
    mesh = make_mesh(tensor=4)
    with pytest.raises(ValueError, match="mlp of size 6 does not divide over 4"):
        named_sharding(mesh, ShardingRules(), (6, 8), ("mlp", "embed"))
