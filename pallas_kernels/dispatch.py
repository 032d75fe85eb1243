"""Picks the implementation of an operation: the first back end that takes the arguments.

A back end refuses with `NotImplementedError("why")`; that means "not these arguments, or not this
machine: try the next", never a failure while running. Choices are made while tracing, from shapes,
dtypes and the platform alone.

Kernels have no derivative of their own. Traced under `differentiable()`, an operation keeps the
bits of the back end it picks, and goes backwards through a formula of the same result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

_is_differentiable: ContextVar[bool] = ContextVar("is_differentiable", default=False)


@contextmanager
def differentiable() -> Iterator[None]:
    """Trace for `jax.grad` and the like. Holds for this thread only; JAX keeps traces by function
    and shapes, not by this: trace a function object either so or so.
    """
    token = _is_differentiable.set(True)
    try:
        yield
    finally:
        _is_differentiable.reset(token)


def first_of(*backends: Callable[P, R], formula: Callable[P, R] | None = None) -> Callable[P, R]:
    """The operation that tries `backends` in order and raises the last refusal if none takes the
    arguments. `formula` is what can be differentiated in reverse, if the last back end cannot (a
    loop whose trip count is data).
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for backend in backends[:-1]:
            try:
                return call(backend, *args, **kwargs)
            except NotImplementedError:
                continue
        return call(backends[-1], *args, **kwargs)

    def call(backend: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        smooth = backends[-1] if formula is None else formula
        if not _is_differentiable.get() or backend is smooth:
            return backend(*args, **kwargs)
        return _with_gradient(backend, smooth, args, kwargs)

    return run


def _with_gradient(
    backend: Callable[..., R],
    smooth: Callable[..., R],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> R:
    """The back end's result, with the derivative of `smooth` at the same arguments."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]

    def apply(function: Callable[..., R], arrays: list[Any]) -> R:
        values = iter(arrays)
        merged = [
            next(values) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(structure, merged)
        return function(*args, **kwargs)

    @jax.custom_vjp
    def operation(arrays: list[Any]) -> R:
        return apply(backend, arrays)

    def forward(arrays: list[Any]) -> tuple[R, list[Any]]:
        return apply(backend, arrays), arrays

    def backward(arrays: list[Any], cotangent: R) -> tuple[list[Any]]:
        with differentiable():  # a reference calls other operations
            result, pull_back = jax.vjp(lambda arrays: apply(smooth, arrays), arrays)
            return pull_back(jax.tree.map(_fitted, cotangent, result))

    operation.defvjp(forward, backward)
    return operation([leaf for leaf, array in zip(leaves, is_array, strict=True) if array])


def _fitted(cotangent: jax.Array, result: jax.Array) -> jax.Array:
    """Kernels may leave open a sum of several float32 parts [P, ...] of which a formula gives one:
    each part's cotangent is the sum's.
    """
    if cotangent.dtype == jax.dtypes.float0 or cotangent.shape == result.shape:
        return cotangent
    return cotangent[: result.shape[0]].astype(result.dtype)
