"""One open stream of `AsyncEngine`."""

import asyncio

from jengine.output_processor import RequestState
from jengine.outputs import RequestOutput


class RequestStream:
    """The reader's end of a request: a state that grows, and a bell."""

    def __init__(self, state: RequestState) -> None:
        self.state = state
        self.timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None
        self._bell = asyncio.Event()

    def wake(self) -> None:
        self._bell.set()

    def fail(self, error: Exception) -> None:
        """Make the reader raise."""
        self._error = error
        self._bell.set()

    async def next(self) -> RequestOutput:
        """Wait for news. Raises the request's error."""
        while True:
            if (error := self._error or self.state.error) is not None:
                raise error
            if (output := self.state.take()) is not None:
                return output
            self._bell.clear()
            await self._bell.wait()
