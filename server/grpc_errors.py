"""jengine's errors as gRPC statuses, with details that a client can act on."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from jengine.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineDrainingError,
    InvalidRequestError,
    JengineError,
    ModelNotFoundError,
    QueueFullError,
    UnsupportedError,
    shortened,
)
from jengine.server.state import EngineLoadingError, new_request_id

logger = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "jengine"
RETRY_SECONDS = 1

# First match wins. `reason` tells apart what shares a status.
_STATUSES: tuple[tuple[type[JengineError], grpc.StatusCode, str], ...] = (
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (ModelNotFoundError, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    (DuplicateRequestError, grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST"),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (EngineDrainingError, grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    (EngineLoadingError, grpc.StatusCode.UNAVAILABLE, "LOADING"),
    (EngineDeadError, grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD"),
    (UnsupportedError, grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED"),
)


class answered:
    """Turns what escapes `async with answered(context):` into a status. Cancellation passes
    through.

    A context manager rather than a decorator: grpc.aio looks at the handler to see whether it is an
    async generator, so handlers must stay what they are.
    """

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, JengineError):
            await abort_with(self._context, error)
        elif isinstance(error, TimeoutError):
            await self._context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error) or "too late")
        elif isinstance(error, Exception) and not isinstance(
            error, (asyncio.CancelledError, grpc.aio.AbortError)
        ):
            await self._abort_with_bug(error)

    async def _abort_with_bug(self, error: Exception) -> NoReturn:
        """The text of an unforeseen error may hold anything: it goes to the log, its number to the
        client.
        """
        number = new_request_id("err-")
        logger.error("internal error %s", number, exc_info=error)
        await self._context.abort(grpc.StatusCode.INTERNAL, f"internal error {number}")


async def abort_with(context: grpc.aio.ServicerContext, error: JengineError) -> NoReturn:
    """End the call with the status of `error`."""
    code, reason = status_of(error)
    await context.abort(
        code,
        shortened(str(error)),
        trailing_metadata=((DETAILS_KEY, status_details(code, reason, error)),),
    )


async def refuse(context: grpc.aio.ServicerContext, reason: str) -> NoReturn:
    """End a call that this server does not implement, saying why."""
    await abort_with(context, UnsupportedError(reason))


def status_of(error: JengineError) -> tuple[grpc.StatusCode, str]:
    for kind, code, reason in _STATUSES:
        if isinstance(error, kind):
            return code, reason
    return grpc.StatusCode.INTERNAL, "INTERNAL"


def status_details(code: grpc.StatusCode, reason: str, error: JengineError) -> bytes:
    """A serialised google.rpc.Status for the trailer."""
    status = status_pb2.Status(code=_number(code), message=shortened(str(error)))
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN)]
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=shortened(error.field), description=shortened(error.message)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, (QueueFullError, EngineDrainingError, EngineLoadingError)):
        delay = duration_pb2.Duration(seconds=RETRY_SECONDS)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status.SerializeToString()


def _number(code: grpc.StatusCode) -> int:
    value: Any = code.value  # (number, name)
    return value[0]
