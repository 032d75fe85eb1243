"""What ranks of a mesh tell each other, in the words of logical axes.

A rank's program is traced inside `jax.shard_map` (`placement.py`), where these know what is split.
On one device, and for a logical axis that is whole on every rank, they do nothing. Sums never run
over ranks that have other tokens: what those know passes by `gather_over` and `scatter_over`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp

from jengine.sharding.split import Split

_split: ContextVar[Split] = ContextVar("split", default=Split())  # noqa: B039 (frozen)


@contextmanager
def tracing_for(split: Split) -> Iterator[None]:
    """Trace a rank's program. Holds for this thread only."""
    token = _split.set(split)
    try:
        yield
    finally:
        _split.reset(token)


def ways(*logical: str | None) -> int:
    """Over how many ranks of the same tokens these logical axes are split."""
    split = _split.get()
    return math.prod(getattr(split, axis) for axis in _axes_of_sum(*logical))


def ways_of(logical: str) -> int:
    """Over how many ranks a logical axis is split, those of other tokens among them."""
    return _split.get().ways(logical)


def sum_over(x: jax.Array, *logical: str | None) -> jax.Array:
    """The sum of all ranks' `x` over the ranks that split these logical axes."""
    axes = _axes_of_sum(*logical)
    return jax.lax.psum(x, axes) if axes else x


def mean_over(x: jax.Array, logical: str) -> jax.Array:
    axes = _axes_of_sum(logical)
    return jax.lax.pmean(x, axes) if axes else x


def max_over(x: jax.Array, logical: str) -> jax.Array:
    """The largest of all ranks' `x` over the ranks that split a logical axis, other tokens' too."""
    axes = _split.get().axes(logical)
    return jax.lax.pmax(x, axes) if axes else x


def gather_over(x: jax.Array, logical: str, dimension: int) -> jax.Array:
    """All ranks' `x` side by side along a dimension."""
    axes = _split.get().axes(logical)
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def scatter_over(x: jax.Array, logical: str) -> jax.Array:
    """The sum of all ranks' `x`, of which each keeps its part of the first dimension."""
    axes = _split.get().axes(logical)
    return jax.lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True) if axes else x


def exchange_over(x: jax.Array, logical: str) -> jax.Array:
    """Row r of `x` goes to rank r; what comes from it is row r of the result."""
    axes = _split.get().axes(logical)
    if not axes:
        return x
    return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)


def rank_in(logical: str) -> jax.Array:
    """i32[]: which part of a logical axis this rank holds."""
    axes = _split.get().axes(logical)
    return jax.lax.axis_index(axes) if axes else jnp.int32(0)


def once_over(x: jax.Array, *logical: str | None) -> jax.Array:
    """`x` on the first of the ranks that split these logical axes, zeros on the others: for what
    their sum shall hold once.
    """
    axes = _axes_of_sum(*logical)
    return jnp.where(jax.lax.axis_index(axes) == 0, x, jnp.zeros_like(x)) if axes else x


def are_split_together(tokens: str, logical: str) -> bool:
    """Whether ranks that have other tokens hold other parts of a logical axis, too."""
    split = _split.get()
    return not set(split.axes(tokens)).isdisjoint(split.axes(logical))


def _axes_of_sum(*logical: str | None) -> tuple[str, ...]:
    split = _split.get()
    others = split.axes("tokens")
    return tuple(axis for axis in split.axes(*logical) if axis not in others)
