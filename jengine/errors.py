"""Errors that cross a boundary. Servers map each class to one status code."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a process of a supervised or distributed engine tells whoever started it. The numbers
    are those of sysexits.h: a launcher may restart after any but 0 and 78.
    """

    DRAINED = 0
    RESTART = 75  # EX_TEMPFAIL: a replica or a rank was lost
    CONFIG = 78  # EX_CONFIG: it would fail again in the same way


MAX_MESSAGE_BYTES = 600  # gRPC sends it three times over, in headers of at most 8 kB


def shortened(message: str, limit: int = MAX_MESSAGE_BYTES) -> str:
    """What a client is told: valid UTF-8 of bounded length. Messages quote what was sent."""
    data = message.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return data[:limit].decode("utf-8", "ignore") + " ..."


class JengineError(Exception):
    """Base class of every error jengine raises on purpose."""


class InvalidRequestError(JengineError, ValueError):
    """A request field is wrong. `field` names it; the message states the limit (HTTP 400, gRPC
    INVALID_ARGUMENT).
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type["InvalidRequestError"], tuple[str, str]]:
        return type(self), (self.field, self.message)


class DuplicateRequestError(JengineError):
    """`request_id` is already in flight (HTTP 409, gRPC ALREADY_EXISTS)."""


class QueueFullError(JengineError):
    """The waiting queue is at its bound (HTTP 429, gRPC RESOURCE_EXHAUSTED)."""


class EngineDrainingError(JengineError):
    """The engine takes no new requests because it is shutting down (HTTP 503, gRPC UNAVAILABLE)."""


class EngineDeadError(JengineError):
    """The engine core has stopped (HTTP 503, gRPC UNAVAILABLE)."""


class ModelNotFoundError(JengineError):
    """The model name resolves to nothing that can be loaded here."""


class LoadError(JengineError):
    """A checkpoint does not fit the model; the message names the tensor."""


class UnsupportedError(JengineError):
    """A combination of features that this version refuses at start."""


class ConfigurationError(JengineError, ValueError):
    """What this process was told cannot work, or contradicts itself; the message names the flag or
    the variable (exit code 78).
    """
