"""One gRPC port: jengine.v1.Inference, VllmEngine, health and reflection."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto import vllm_engine_pb2_grpc

from jengine.server import inference_service, vllm_service
from jengine.server.grpc_decoding import DecodingInterceptor
from jengine.server.metrics import ThroughputMeter
from jengine.server.proto import engine_pb2_grpc
from jengine.server.settings import ServerSettings
from jengine.server.state import ServerState

SERVICE_NAMES = (inference_service.SERVICE_NAME, vllm_service.SERVICE_NAME)
HEALTH_PREFIX = f"/{health.SERVICE_NAME}/"  # probes carry no key


class GrpcServer:
    """The port and its health. Health says NOT_SERVING until `set_serving(True)`."""

    def __init__(self, state: ServerState, meter: ThroughputMeter) -> None:
        settings = state.settings
        # The first is asked first: without a key nothing is decoded.
        interceptors: list[grpc.aio.ServerInterceptor] = [DecodingInterceptor()]
        if settings.api_keys:
            interceptors.insert(0, KeyInterceptor(settings.api_keys))
        self._server = grpc.aio.server(
            interceptors=interceptors, options=channel_options(settings.max_grpc_message_bytes)
        )
        library: Any = health  # its type stubs leave `aio` out
        self._health = library.aio.HealthServicer()
        engine_pb2_grpc.add_InferenceServicer_to_server(
            inference_service.InferenceService(state), self._server
        )
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(
            vllm_service.VllmEngineService(state, meter), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.grpc_reflection:
            names = (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self._settings = settings
        self.port = 0

    async def start(self) -> None:
        """Listen. Raises OSError if the port is taken, as sockets do."""
        await self.set_serving(False)
        address = f"{bracketed(self._settings.host)}:{self._settings.grpc_port}"
        try:
            if self._settings.ssl_certfile is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials(self._settings))
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from None
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.ServingStatus
        value = status.SERVING if serving else status.NOT_SERVING
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, value)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let running ones end for `grace` seconds, then cancel them."""
        await self._server.stop(grace)


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without one of the keys. Knows only hashes, and compares in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        details: Any = handler_call_details
        if handler is None or details.method.startswith(HEALTH_PREFIX):
            return handler
        headers = {key: value for key, value in details.invocation_metadata}
        if self._is_known(headers.get("authorization", "")):
            return handler
        # grpc.aio picks the call style from the handler: the refusal must have the same arity.
        if handler.response_streaming and handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(_refuse_stream)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_refuse_stream)
        return grpc.unary_unary_rpc_method_handler(_refuse_unary)

    def _is_known(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        (
            "grpc.max_send_message_length",
            -1,
        ),  # what we send is bounded by max_logprobs and max_model_len
        ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share
        # A dead peer must not hold pages: ping silent connections, drop those that do not answer.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def credentials(settings: ServerSettings) -> grpc.ServerCredentials:
    assert settings.ssl_keyfile is not None and settings.ssl_certfile is not None
    pair = (settings.ssl_keyfile.read_bytes(), settings.ssl_certfile.read_bytes())
    authority = settings.ssl_ca_certs.read_bytes() if settings.ssl_ca_certs else None
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authority, require_client_auth=authority is not None
    )


def bracketed(host: str) -> str:
    """IPv6 addresses need brackets before a port."""
    return f"[{host}]" if ":" in host else host


async def _refuse_unary(request: Any, context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong API key")


async def _refuse_stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong API key")
    yield None  # never reached; makes this an async generator
