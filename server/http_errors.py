"""jengine's errors as HTTP answers in the OpenAI shape: {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
import re
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

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
from jengine.server.openai_protocol import ErrorBody, ErrorResponse
from jengine.server.state import EngineLoadingError, new_request_id

logger = logging.getLogger(__name__)

RETRY_AFTER = {"retry-after": "1"}
_STATUSES: tuple[tuple[type[Exception], HTTPStatus, str], ...] = (
    (InvalidRequestError, HTTPStatus.BAD_REQUEST, "BadRequestError"),
    (UnsupportedError, HTTPStatus.BAD_REQUEST, "BadRequestError"),
    (ModelNotFoundError, HTTPStatus.NOT_FOUND, "NotFoundError"),
    (DuplicateRequestError, HTTPStatus.CONFLICT, "ConflictError"),
    (QueueFullError, HTTPStatus.TOO_MANY_REQUESTS, "RateLimitError"),
    (EngineDrainingError, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    (EngineLoadingError, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    (EngineDeadError, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    (TimeoutError, HTTPStatus.GATEWAY_TIMEOUT, "TimeoutError"),
)
_TYPES = {
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestTooLargeError",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "UnsupportedMediaTypeError",
}
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]*)`")


def error_body(
    status: int, message: str, kind: str = "", param: str | None = None
) -> ErrorResponse:
    kind = kind or _TYPES.get(HTTPStatus(status), "BadRequestError")
    param = None if param is None else shortened(param)
    body = ErrorBody(message=shortened(message), type=kind, param=param, code=int(status))
    return ErrorResponse(body)


def describe(error: Exception) -> tuple[ErrorResponse, int]:
    """Body and status of an error raised on purpose."""
    status, name = HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError"
    for kind, its_status, its_name in _STATUSES:
        if isinstance(error, kind):
            status, name = its_status, its_name
            break
    param = error.field if isinstance(error, InvalidRequestError) else None
    if isinstance(error, ModelNotFoundError):
        param = "model"
    return error_body(status, str(error), name, param), status


def error_response(error: Exception) -> Response:
    body, status = describe(error)
    retryable = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
    return json_response(body, status, RETRY_AFTER if retryable else None)


def json_response(
    body: Any, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None
) -> Response:
    return Response(
        msgspec.json.encode(body), status, headers=headers, media_type="application/json"
    )


def from_validation(error: msgspec.DecodeError | UnicodeDecodeError) -> InvalidRequestError:
    """Name the field that msgspec points at."""
    message = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return InvalidRequestError("body", f"is not valid JSON: {message}")
    path = ""
    if match := _PATH.search(message):
        path, message = match["path"], message[: match.start()]
    if match := _MISSING.match(message):
        path = f"{path}.{match['name']}" if path else match["name"]
        message = "is required"
    return InvalidRequestError(path or "body", message)


async def on_jengine_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Unknown path, wrong method, and what middleware refuses."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers) if error.headers else None
    return json_response(error_body(error.status_code, error.detail), error.status_code, headers)


async def on_bug(request: Request, error: Exception) -> Response:
    """The text of an unforeseen error may hold anything: Starlette logs it, the client gets a
    number.
    """
    number = new_request_id("err-")
    logger.error("internal error %s", number, exc_info=error)
    body = error_body(500, f"internal error {number}", "InternalServerError")
    return json_response(body, HTTPStatus.INTERNAL_SERVER_ERROR)


HANDLERS: dict[Any, Any] = {
    JengineError: on_jengine_error,
    TimeoutError: on_jengine_error,
    HTTPException: on_http_exception,
    Exception: on_bug,
}
