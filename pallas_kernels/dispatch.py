"""Picks the implementation of an operation: the first back end that takes the arguments.

A back end refuses with `NotImplementedError("why")`; that means "not these arguments, or not this
machine: try the next", never a failure while running. Choices are made while tracing, from shapes,
dtypes and the platform alone.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def first_of(*backends: Callable[P, R]) -> Callable[P, R]:
    """The operation that tries `backends` in order and raises the last refusal if none takes the
    arguments.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for backend in backends[:-1]:
            try:
                return backend(*args, **kwargs)
            except NotImplementedError:
                continue
        return backends[-1](*args, **kwargs)

    return run
