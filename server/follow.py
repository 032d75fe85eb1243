"""Noticing that a parent process is gone."""

import asyncio
import logging
import os
from collections.abc import Callable

logger = logging.getLogger(__name__)

STDIN_FD = 0


def follow_stdin(on_end: Callable[[], None]) -> None:
    """Call `on_end` on this loop when standard input ends: it is a pipe, and whoever held its other
    end is gone.
    """
    loop = asyncio.get_running_loop()

    def on_readable() -> None:
        if not os.read(STDIN_FD, 4096):
            loop.remove_reader(STDIN_FD)
            logger.warning("standard input has ended: draining")
            on_end()

    loop.add_reader(STDIN_FD, on_readable)
