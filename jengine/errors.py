"""Errors that cross a boundary. Servers map each class to one status code."""


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
