"""Abstract arrays of a runner, and what they weigh on a device."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jengine.kv_spec import KVGroup
from jengine.layers.param import ParamInfo
from jengine.layers.sampling import RowState
from jengine.sharding.cut import Cut
from jengine.sharding.placement import Placement


def abstract_leaf(info: ParamInfo, cut: Cut | None, placement: Placement) -> jax.ShapeDtypeStruct:
    dtype = jnp.dtype(info.dtype)
    if cut is None:
        return jax.ShapeDtypeStruct(info.shape, dtype, sharding=placement.replicated)
    return jax.ShapeDtypeStruct(cut.shape, dtype, sharding=placement.of(cut))


def abstract_kv(
    groups: tuple[KVGroup, ...],
    group_of_layer: tuple[int, ...],
    num_pages: tuple[int, ...],
    placement: Placement,
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One array for each layer; every rank has so many pages."""
    return tuple(
        jax.ShapeDtypeStruct(
            (placement.num_ranks * num_pages[g], *groups[g].page_shape),
            jnp.dtype(groups[g].spec.dtype),
            sharding=placement.per_rank,
        )
        for g in group_of_layer
    )


def abstract_rows(
    num_rows: int,
    vocab_size: int,
    num_groups: int,
    pages_per_seq: int,
    placement: Placement,
    slot_load: tuple[int, int] | None = None,
) -> RowState:
    """`slot_load`: (layers, slots) of experts in slots."""
    sharding = placement.per_data_rank

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    num_rows *= placement.split.data
    return RowState(
        last_token=array(jnp.int32, num_rows),
        output_counts=array(jnp.int32, num_rows, vocab_size),
        prompt_mask=array(jnp.bool_, num_rows, vocab_size),
        bias=array(jnp.float32, num_rows, vocab_size),
        page_tables=(array(jnp.int32, num_rows, pages_per_seq),) * num_groups,
        slot_load=slot_load and array(jnp.int32, placement.split.data, *slot_load),
    )


def num_bytes(tree: Any) -> int:
    """Of arrays that have a sharding, concrete or abstract."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
