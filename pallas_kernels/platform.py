"""What the program being traced is for: back ends are chosen by it (`dispatch.py`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import jax

Platform = Literal["cpu", "cuda"]

_target: ContextVar[Platform | None] = ContextVar("target_platform", default=None)
_is_invariant: ContextVar[bool] = ContextVar("is_batch_invariant", default=True)


def platform() -> str:
    """ "cpu", "cuda", or JAX's own name of another back end."""
    if (target := _target.get()) is not None:
        return target
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


@contextmanager
def tracing_for(target: Platform) -> Iterator[None]:
    """Trace for `target` on a machine that may lack it, so that a test can compile its program.

    Holds for this thread only. JAX keeps traces by function and shapes, not by this: trace a
    function object for one platform only.
    """
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def is_batch_invariant() -> bool:
    """Whether a row must have the same bits in every batch and bucket (docs/determinism.md). On a
    CPU it always has.
    """
    return _is_invariant.get()


@contextmanager
def tracing_invariant(wanted: bool) -> Iterator[None]:
    """Trace with or without that promise; holds as `tracing_for` does."""
    token = _is_invariant.set(wanted)
    try:
        yield
    finally:
        _is_invariant.reset(token)


def require_cuda() -> None:
    """Refuse (see `dispatch.py`) unless the program is for an NVIDIA GPU."""
    if platform() != "cuda":
        raise NotImplementedError("runs on NVIDIA GPUs")


def compute_capability() -> tuple[int, int]:
    """Of the GPU that the program is for; Hopper's where it is traced without one."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return 9, 0
    major, minor = str(device.compute_capability).split(".")
    return int(major), int(minor)


def is_hopper() -> bool:
    """Whether the program is for an NVIDIA GPU with warpgroup instructions (9.x)."""
    return platform() == "cuda" and compute_capability()[0] == 9
