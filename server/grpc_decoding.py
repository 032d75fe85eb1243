"""Bytes that are no message: INVALID_ARGUMENT. grpc.aio itself says UNKNOWN, and logs a
traceback.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from jengine.errors import InvalidRequestError
from jengine.server.grpc_errors import abort_with


@dataclass(frozen=True, slots=True)
class Undecodable:
    """What stands in for a request that could not be read."""

    reason: str


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Goes around the decoders of all methods that take one message."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        decode = handler.request_deserializer

        def decode_or_say(data: bytes) -> Any:
            try:
                return decode(data)
            except (DecodeError, RecursionError) as error:
                return Undecodable(str(error))

        if handler.response_streaming:
            wrap: Any = grpc.unary_stream_rpc_method_handler
            method: Any = handler.unary_stream
            # Both styles exist, and grpc.aio tells them apart by looking at the function.
            is_generator = inspect.isasyncgenfunction(method)
            method = _guard_stream(method) if is_generator else _guard_unary(method)
        else:
            wrap = grpc.unary_unary_rpc_method_handler
            method = _guard_unary(handler.unary_unary)
        return wrap(method, decode_or_say, handler.response_serializer)


def _guard_unary(method: Any) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(request, Undecodable):
            await _refuse(request, context)
        return await method(request, context)

    return guarded


def _guard_stream(method: Any) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        if isinstance(request, Undecodable):
            await _refuse(request, context)
        async with aclosing(method(request, context)) as responses:
            async for response in responses:
                yield response

    return guarded


async def _refuse(request: Undecodable, context: grpc.aio.ServicerContext) -> None:
    await abort_with(context, InvalidRequestError("message", request.reason))
