"""What both protocols share: the engine (once there is one), settings, metrics, and whether to
serve at all.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from jengine.config import EngineConfig
from jengine.errors import (
    EngineDeadError,
    EngineDrainingError,
    InvalidRequestError,
    JengineError,
    ModelNotFoundError,
)
from jengine.server.metrics import ServerMetrics
from jengine.server.settings import ServerSettings

if TYPE_CHECKING:
    from jengine.async_engine import AsyncEngine

MAX_REQUEST_ID_LENGTH = 128


class EngineLoadingError(JengineError):
    """The engine is not ready yet (HTTP 503, gRPC UNAVAILABLE)."""


class Status(StrEnum):
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(slots=True)
class ServerState:
    """One for each process, written by `app.ServerApp` alone. `engine` is None until it is ready to
    serve.
    """

    settings: ServerSettings
    config: EngineConfig
    metrics: ServerMetrics
    engine: AsyncEngine | None = None
    is_draining: bool = False
    load_error: str | None = None
    num_active: int = 0  # requests inside `tracking.tracked`
    last_receive_time: float = 0.0
    started_at: float = field(default_factory=time.monotonic)
    # Outputs on their way to clients, by a key of `tracked`: since when, request id, endpoint.
    unread: dict[int, tuple[float, str, str]] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        if self.load_error is not None or (self.engine is not None and self.engine.is_dead):
            return Status.DEAD
        if self.engine is None:
            return Status.LOADING
        return Status.DRAINING if self.is_draining or self.engine.is_draining else Status.SERVING

    @property
    def uptime_seconds(self) -> float:
        return time.monotonic() - self.started_at

    def ready_engine(self) -> AsyncEngine:
        """The engine, for facts about it: also while it drains."""
        if self.status is Status.DEAD:
            raise EngineDeadError("the engine has stopped")
        if self.engine is None:
            raise EngineLoadingError("the model is still loading")
        return self.engine

    def serving_engine(self) -> AsyncEngine:
        """The engine, for new work."""
        engine = self.ready_engine()
        if self.status is Status.DRAINING:
            raise EngineDrainingError("the server is shutting down")
        return engine

    async def end_unread(self) -> None:
        """Abort requests that the client has left unread for too long: what they have made is kept
        for it, their pages are for others."""
        oldest = time.monotonic() - self.settings.unread_timeout
        for key, (since, request_id, endpoint) in list(self.unread.items()):
            if since < oldest and self.engine is not None:
                del self.unread[key]
                self.metrics.stall(endpoint)
                await self.engine.abort(request_id)

    @property
    def model_name(self) -> str:
        """The name that responses carry."""
        model = self.config.model
        return (model.served_model_name or (model.model,))[0]

    def check_model(self, name: str | None) -> None:
        """No name means the model that is served."""
        model = self.config.model
        if name and name not in (model.served_model_name or (model.model,)):
            raise ModelNotFoundError(f"The model `{name}` does not exist.")


def new_request_id(prefix: str = "") -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def check_request_id(request_id: str, field_name: str = "request_id") -> str:
    """Ids travel in headers and logs: visible ASCII of bounded length only."""
    is_visible = all("!" <= char <= "~" for char in request_id)
    if not request_id or len(request_id) > MAX_REQUEST_ID_LENGTH or not is_visible:
        raise InvalidRequestError(
            field_name, f"must be 1 to {MAX_REQUEST_ID_LENGTH} visible ASCII characters"
        )
    return request_id
