"""The two clients: the same calls, blocking and for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from jengine.client.convert import (
    call_metadata,
    chat_request,
    from_rpc_error,
    generate_request,
    to_delta,
    to_server_info,
)
from jengine.client.types import CallOptions, Delta, ServerInfo
from jengine.server.proto import engine_pb2 as pb
from jengine.server.proto import engine_pb2_grpc

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
DEFAULT_OPTIONS = CallOptions()
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]


class Client:
    """Blocking. Safe to share between threads."""

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._metadata = call_metadata(api_key)
        self._channel = (
            grpc.insecure_channel(target, _OPTIONS)
            if credentials is None
            else grpc.secure_channel(target, credentials, _OPTIONS)
        )
        self._stub: Any = engine_pb2_grpc.InferenceStub(self._channel)

    def generate(
        self, prompt: str | Sequence[int], options: CallOptions = DEFAULT_OPTIONS, **sampling: Any
    ) -> Iterator[Delta]:
        """Complete text or token ids."""
        return self._stream(
            self._stub.Generate, generate_request(prompt, options, sampling), options
        )

    def chat(
        self,
        messages: Iterable[Mapping[str, str]],
        options: CallOptions = DEFAULT_OPTIONS,
        **sampling: Any,
    ) -> Iterator[Delta]:
        """Answer a conversation."""
        return self._stream(self._stub.Chat, chat_request(messages, options, sampling), options)

    def tokenize(self, text: str, *, add_special_tokens: bool = True, model: str = "") -> list[int]:
        request = pb.TokenizeRequest(model=model, text=text, add_special_tokens=add_special_tokens)
        return list(self._call(self._stub.Tokenize, request).token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, model: str = ""
    ) -> str:
        request = pb.DetokenizeRequest(
            model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return self._call(self._stub.Detokenize, request).text

    def server_info(self) -> ServerInfo:
        return to_server_info(self._call(self._stub.ServerInfo, pb.ServerInfoRequest()))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def _stream(self, method: Any, request: Any, options: CallOptions) -> Iterator[Delta]:
        call = method(request, metadata=self._metadata, timeout=options.timeout)
        try:
            for response in call:
                yield to_delta(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()


class AsyncClient:
    """For asyncio; belongs to the loop it was made on."""

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._metadata = call_metadata(api_key)
        self._channel = (
            grpc.aio.insecure_channel(target, _OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, _OPTIONS)
        )
        self._stub: Any = engine_pb2_grpc.InferenceStub(self._channel)

    def generate(
        self, prompt: str | Sequence[int], options: CallOptions = DEFAULT_OPTIONS, **sampling: Any
    ) -> AsyncIterator[Delta]:
        """Complete text or token ids."""
        return self._stream(
            self._stub.Generate, generate_request(prompt, options, sampling), options
        )

    def chat(
        self,
        messages: Iterable[Mapping[str, str]],
        options: CallOptions = DEFAULT_OPTIONS,
        **sampling: Any,
    ) -> AsyncIterator[Delta]:
        """Answer a conversation."""
        return self._stream(self._stub.Chat, chat_request(messages, options, sampling), options)

    async def tokenize(
        self, text: str, *, add_special_tokens: bool = True, model: str = ""
    ) -> list[int]:
        request = pb.TokenizeRequest(model=model, text=text, add_special_tokens=add_special_tokens)
        return list((await self._call(self._stub.Tokenize, request)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, model: str = ""
    ) -> str:
        request = pb.DetokenizeRequest(
            model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return (await self._call(self._stub.Detokenize, request)).text

    async def server_info(self) -> ServerInfo:
        return to_server_info(await self._call(self._stub.ServerInfo, pb.ServerInfoRequest()))

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def _stream(
        self, method: Any, request: Any, options: CallOptions
    ) -> AsyncIterator[Delta]:
        call = method(request, metadata=self._metadata, timeout=options.timeout)
        try:
            async for response in call:
                yield to_delta(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()
