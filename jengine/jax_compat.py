"""The one place for private JAX names: what they do, and the versions they were read in."""

import logging
from pathlib import Path

from jax._src import xla_bridge

NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # Linux; Linux inside of Windows


def backends_are_initialized() -> bool:
    """Whether a back end has started: its memory pool cannot be sized any more. (0.10.2, 0.11.2)"""
    return xla_bridge.backends_are_initialized()


def quiet_without_gpu() -> None:
    """Call before the first use of devices. JAX's CUDA plugin, installed for its compiler alone,
    reports a machine without a GPU as an error with a traceback, and JAX goes on to the CPU. The
    report is dropped where no NVIDIA driver is loaded. (0.11.2)
    """
    if not any(Path(path).exists() for path in NVIDIA_DEVICES):
        logging.getLogger(xla_bridge.__name__).addFilter(_is_not_about_cuda)


def _is_not_about_cuda(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not (message.startswith("Jax plugin configuration error") and "cuda" in message)
