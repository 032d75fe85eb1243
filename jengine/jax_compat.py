"""The one place for private JAX names: what they do, and the versions they were read in."""

from jax._src import xla_bridge


def backends_are_initialized() -> bool:
    """Whether a back end has started: its memory pool cannot be sized any more. (0.10.2, 0.11.2)"""
    return xla_bridge.backends_are_initialized()
