"""Running the prompts of one HTTP request: submitting, merging their streams, adding up their
usage.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from jengine.beam_search import BeamSearchParams
from jengine.errors import InvalidRequestError
from jengine.outputs import CompletionOutput, RequestOutput
from jengine.request import SamplingParams
from jengine.server import openai_render
from jengine.server.openai_protocol import SamplingRequest
from jengine.server.state import ServerState, check_request_id, new_request_id
from jengine.server.tracking import Submission, tracked


@dataclass(frozen=True, slots=True)
class Prepared:
    """One prompt, tokenised."""

    token_ids: list[int]
    text: str | None


@dataclass(slots=True)
class UsageCounter:
    """Adds up tokens over prompts and choices."""

    shows_cached: bool
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    completion_tokens: int = 0

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        self.prompt_tokens[prompt_index] = len(output.prompt_token_ids)
        self.cached_tokens[prompt_index] = output.num_cached_tokens or 0
        self.completion_tokens += sum(len(c.token_ids) for c in output.outputs)

    def total(self) -> dict[str, Any]:
        cached = sum(self.cached_tokens.values()) if self.shows_cached else None
        return openai_render.usage(sum(self.prompt_tokens.values()), self.completion_tokens, cached)


def response_id(prefix: str, request: Request, body: SamplingRequest) -> str:
    """From the body, else from `x-request-id`, else new."""
    given = body.request_id or request.headers.get("x-request-id")
    return f"{prefix}-{check_request_id(given)}" if given else new_request_id(f"{prefix}-")


def submissions(
    prepared: Sequence[Prepared],
    sampling: SamplingParams,
    base_id: str,
    body: SamplingRequest,
    endpoint: str,
    beams: BeamSearchParams | None,
) -> list[Submission]:
    """One for each prompt; with several, their ids get a number."""
    return [
        Submission(
            request_id=base_id if len(prepared) == 1 else f"{base_id}-{index}",
            prompt_token_ids=prompt.token_ids,
            prompt=prompt.text,
            sampling=sampling,
            endpoint=endpoint,
            priority=body.priority,
            cache_salt=body.cache_salt or "",
            constraint_field=body.constraint_field,
            beams=beams,
        )
        for index, prompt in enumerate(prepared)
    ]


def merged(
    state: ServerState, requests: Sequence[Submission]
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """(prompt index, output) of all prompts as they come. Closing it aborts them all."""
    return _single(state, requests[0]) if len(requests) == 1 else _several(state, requests)


async def collected(state: ServerState, requests: Sequence[Submission]) -> list[RequestOutput]:
    """Final outputs, in the prompts' order, each with all its choices in order."""
    finals: dict[int, RequestOutput] = {}
    choices: dict[int, dict[int, CompletionOutput]] = {}
    async with aclosing(merged(state, requests)) as outputs:
        async for index, output in outputs:
            finals[index] = output
            of_prompt = choices.setdefault(index, {})
            of_prompt.update((choice.index, choice) for choice in output.outputs)
    for index, output in finals.items():
        output.outputs = [choice for _, choice in sorted(choices[index].items())]
    return [finals[index] for index in range(len(requests))]


class Outputs:
    """Outputs whose first element is there already: what is refused is refused before a status line
    is sent.
    """

    def __init__(
        self,
        first: tuple[int, RequestOutput],
        rest: AsyncGenerator[tuple[int, RequestOutput], None],
    ) -> None:
        self._first = first
        self._rest = rest

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        yield self._first
        async for item in self._rest:
            yield item

    async def aclose(self) -> None:
        await self._rest.aclose()


async def peeked(state: ServerState, requests: Sequence[Submission]) -> Outputs:
    """Start the prompts and wait for the first output. Raises what refuses them."""
    outputs = merged(state, requests)
    try:
        return Outputs(await anext(outputs), outputs)
    except BaseException:  # cancelled while waiting, or refused
        await outputs.aclose()
        raise


def token_text(state: ServerState, body: SamplingRequest) -> Callable[[int], str]:
    """How logprobs show a token."""
    as_ids = body.return_tokens_as_token_ids
    if as_ids is None:
        as_ids = state.settings.return_tokens_as_token_ids
    return (lambda i: f"token_id:{i}") if as_ids else state.ready_engine().tokenizer.id_to_token


def check_length(prompt: Prepared, max_tokens: int | None, limit: int, param: str) -> None:
    """As OpenAI and vLLM: asking for more than fits is an error, not silently less."""
    if max_tokens is not None and len(prompt.token_ids) + max_tokens > limit:
        raise InvalidRequestError(
            param,
            f"this model's maximum context length is {limit} tokens; you asked for "
            f"{len(prompt.token_ids) + max_tokens} ({len(prompt.token_ids)} in the prompt, "
            f"{max_tokens} for the completion)",
        )


async def _single(
    state: ServerState, request: Submission
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    async with aclosing(tracked(state, request)) as outputs:
        async for output in outputs:
            yield 0, output


async def _several(
    state: ServerState, requests: Sequence[Submission]
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Asks each stream for one output at a time, so that the engine merges tokens for a slow
    reader.
    """
    streams = [tracked(state, request) for request in requests]
    waiting = {asyncio.ensure_future(anext(s, None)): index for index, s in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                if (output := task.result()) is not None:
                    waiting[asyncio.ensure_future(anext(streams[index], None))] = index
                    yield index, output
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
