"""Abstract arrays of a runner, and what they weigh."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jengine.kv_spec import KVGroup
from jengine.layers.param import ParamInfo
from jengine.layers.sampling import RowState


def abstract_leaf(info: ParamInfo, placement: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(info.shape, jnp.dtype(info.dtype), sharding=placement)


def abstract_kv(
    groups: tuple[KVGroup, ...],
    group_of_layer: tuple[int, ...],
    num_pages: tuple[int, ...],
    placement: Sharding,
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One array for each layer."""
    return tuple(
        jax.ShapeDtypeStruct(
            (num_pages[g], *groups[g].page_shape),
            jnp.dtype(groups[g].spec.dtype),
            sharding=placement,
        )
        for g in group_of_layer
    )


def abstract_rows(
    num_rows: int, vocab_size: int, num_groups: int, pages_per_seq: int, placement: Sharding
) -> RowState:
    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=placement)

    return RowState(
        last_token=array(jnp.int32, num_rows),
        output_counts=array(jnp.int32, num_rows, vocab_size),
        prompt_mask=array(jnp.bool_, num_rows, vocab_size),
        bias=array(jnp.float32, num_rows, vocab_size),
        page_tables=(array(jnp.int32, num_rows, pages_per_seq),) * num_groups,
    )


def num_bytes(tree: Any) -> int:
    """Of arrays, concrete or abstract."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
