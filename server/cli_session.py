"""What `jengine chat`, `generate` and `plan` talk to: a server, or an engine loaded into this
process.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, Protocol

from rich.console import Console

from jengine.async_engine import AsyncEngine
from jengine.client import AsyncClient
from jengine.config import EngineConfig
from jengine.errors import InvalidRequestError
from jengine.request import RequestOutputKind, SamplingParams
from jengine.server.state import new_request_id

Message = dict[str, str]
console = Console(stderr=True)


class Session(Protocol):
    """Streams of text."""

    def chat(self, messages: Sequence[Message], sampling: Mapping[str, Any]) -> AsyncIterator[str]:
        """The answer, piece by piece."""
        ...

    def complete(self, prompt: str, sampling: Mapping[str, Any]) -> AsyncIterator[str]:
        """What follows the prompt, piece by piece."""
        ...


def open_session(
    config: EngineConfig | None, target: str, api_key: str | None
) -> AbstractAsyncContextManager[Session]:
    return _remote(target, api_key) if config is None else _local(config)


async def chat(
    opened: AbstractAsyncContextManager[Session],
    system_prompt: str | None,
    quick: str | None,
    sampling: Mapping[str, Any],
) -> None:
    """One exchange with `quick`, else until end of input."""
    messages: list[Message] = []
    if system_prompt is not None:
        messages.append({"role": "system", "content": system_prompt})
    async with opened as session:
        while (text := quick if quick is not None else _ask()) is not None:
            messages.append({"role": "user", "content": text})
            answer = ""
            async for piece in session.chat(messages, sampling):
                answer += piece
                _write(piece)
            _write("\n")
            messages.append({"role": "assistant", "content": answer})
            if quick is not None:
                return


async def complete(
    opened: AbstractAsyncContextManager[Session],
    prompts: Sequence[str],
    sampling: Mapping[str, Any],
) -> None:
    async with opened as session:
        for prompt in prompts:
            _write(prompt)
            async for piece in session.complete(prompt, sampling):
                _write(piece)
            _write("\n")


async def memory_plan(config: EngineConfig) -> str:
    async with _engine(config, in_process=False) as engine:
        return engine.ready.memory_plan


class RemoteSession:
    """Over jengine.v1."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def chat(
        self, messages: Sequence[Message], sampling: Mapping[str, Any]
    ) -> AsyncIterator[str]:
        async for delta in self._client.chat(messages, **sampling):
            yield delta.text

    async def complete(self, prompt: str, sampling: Mapping[str, Any]) -> AsyncIterator[str]:
        async for delta in self._client.generate(prompt, **sampling):
            yield delta.text


class LocalSession:
    """On an engine of our own, with the model's own sampling defaults."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def chat(
        self, messages: Sequence[Message], sampling: Mapping[str, Any]
    ) -> AsyncIterator[str]:
        text = await self._engine.render_chat(messages)
        ids = await self._engine.encode(text, add_special_tokens=False)
        async for piece in self._stream({"prompt_token_ids": ids}, sampling):
            yield piece

    async def complete(self, prompt: str, sampling: Mapping[str, Any]) -> AsyncIterator[str]:
        async for piece in self._stream({"prompt": prompt}, sampling):
            yield piece

    async def _stream(self, prompt: Any, sampling: Mapping[str, Any]) -> AsyncIterator[str]:
        fields = {"max_tokens": None, **self._engine.model_info.default_sampling_params}
        fields |= {name: value for name, value in sampling.items() if value is not None}
        params = SamplingParams(**fields, output_kind=RequestOutputKind.DELTA)
        async for output in self._engine.generate(prompt, params, new_request_id()):
            yield output.outputs[0].text


@asynccontextmanager
async def _remote(target: str, api_key: str | None) -> AsyncIterator[Session]:
    async with AsyncClient(target, api_key=api_key) as client:
        yield RemoteSession(client)


@asynccontextmanager
async def _local(config: EngineConfig) -> AsyncIterator[Session]:
    if config.model.skip_tokenizer_init:
        raise InvalidRequestError("skip_tokenizer_init", "this command needs the tokenizer")
    async with _engine(config, in_process=True) as engine:
        yield LocalSession(engine)


@asynccontextmanager
async def _engine(config: EngineConfig, *, in_process: bool) -> AsyncIterator[AsyncEngine]:
    logging.getLogger("jengine").setLevel(logging.WARNING)
    waiting = console.status(f"loading {config.model.model}") if console.is_terminal else None
    with waiting or nullcontext():
        engine = await AsyncEngine.create(config, in_process=in_process)
    try:
        yield engine
    finally:
        await engine.shutdown()


def _ask() -> str | None:
    """A line from the user; None at the end of input."""
    try:
        return input("> ")
    except EOFError:
        return None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
