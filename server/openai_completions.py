"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jengine.outputs import CompletionOutput, RequestOutput
from jengine.request import SamplingParams
from jengine.server import openai_beams, openai_render, openai_run
from jengine.server.http_errors import json_response
from jengine.server.http_io import DONE, EventStream, read_body, unless_gone
from jengine.server.openai_protocol import COMPLETION_MAX_TOKENS, CompletionRequest
from jengine.server.openai_run import Outputs, Prepared, UsageCounter
from jengine.server.state import ServerState

ENDPOINT = "/v1/completions"


async def completions(request: Request) -> Response:
    state: ServerState = request.app.state.server
    body = await read_body(request, CompletionRequest)
    state.check_model(body.model)
    engine = state.serving_engine()
    body.check_completion()
    run = _Run(state, body, engine.model_info.default_sampling_params)
    prepared = await run.prepare()
    response_id = openai_run.response_id("cmpl", request, body)
    prompts = [prompt.token_ids for prompt in prepared]
    beams = openai_beams.build_beams(state, body, prompts, run.sampling.max_tokens)
    requests = openai_run.submissions(prepared, run.sampling, response_id, body, ENDPOINT, beams)
    if body.stream:
        outputs = await unless_gone(request, openai_run.peeked(state, requests))
        events = run.events(outputs, response_id, prepared)
        return EventStream(events, outputs, state.settings.ping_seconds)
    finals = await unless_gone(request, openai_run.collected(state, requests))
    return json_response(run.answer(finals, response_id))


class _Run:
    """One request: its sampling parameters and how its answer is written."""

    def __init__(
        self, state: ServerState, body: CompletionRequest, defaults: Mapping[str, Any]
    ) -> None:
        self._state = state
        self._body = body
        self._num_choices = body.n or 1
        self._text_of = openai_run.token_text(state, body)
        max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        # echo with max_tokens 0 scores a prompt (lm-eval); the engine makes one token, which is
        # dropped.
        self._drops_output = body.echo and max_tokens == 0
        prompt_logprobs = body.prompt_logprobs
        if prompt_logprobs is None and body.echo:
            prompt_logprobs = body.logprobs
        self.sampling: SamplingParams = body.build_sampling(
            defaults,
            max_tokens=1 if self._drops_output else max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    async def prepare(self) -> list[Prepared]:
        engine = self._state.serving_engine()

        async def one(prompt: str | list[int]) -> Prepared:
            if isinstance(prompt, str):
                ids = await engine.encode(prompt, add_special_tokens=self._body.add_special_tokens)
                return Prepared(ids, prompt)
            text = await engine.decode(prompt) if self._body.echo else None
            return Prepared(prompt, text)

        prepared = await asyncio.gather(*(one(prompt) for prompt in self._body.prompts()))
        if self._body.truncate_prompt_tokens is None:
            for prompt in prepared:
                limit = engine.model_info.max_model_len
                openai_run.check_length(prompt, self._body.max_tokens, limit, "max_tokens")
        return prepared

    def answer(self, finals: list[RequestOutput], response_id: str) -> dict[str, Any]:
        counter = UsageCounter(self._state.settings.enable_prompt_tokens_details)
        choices: list[dict[str, Any]] = []
        for prompt_index, output in enumerate(finals):
            self._drop(output)
            counter.add(prompt_index, output)
            for completion in output.outputs:
                writer = _ChoiceWriter(self, prompt_index, completion.index)
                choice = writer.choice(output, completion)
                if self._body.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = openai_render.prompt_logprobs(output)
                choices.append(choice)
        return {
            "id": response_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._state.model_name,
            "choices": choices,
            "usage": counter.total(),
        }

    async def events(
        self, outputs: Outputs, response_id: str, prepared: list[Prepared]
    ) -> AsyncGenerator[bytes, None]:
        body = self._body
        counter = UsageCounter(self._state.settings.enable_prompt_tokens_details)
        chunks = openai_render.ChunkWriter("text_completion", response_id, self._state.model_name)
        writers: dict[tuple[int, int], _ChoiceWriter] = {}
        has_extras = body.top is not None or body.return_token_ids
        async for prompt_index, output in outputs:
            self._drop(output)
            counter.add(prompt_index, output)
            for completion in output.outputs:
                key = prompt_index, completion.index
                if key not in writers:
                    writers[key] = _ChoiceWriter(self, *key)
                writer = writers[key]
                is_plain = not has_extras and not (body.echo and not writer.has_echoed)
                if is_plain and completion.finish_reason is None and not body.has_continuous_usage:
                    if completion.text:
                        yield chunks.completion_text(writer.index, completion.text)
                    continue
                choice = writer.choice(output, completion)
                usage = counter.total() if body.has_continuous_usage else None
                yield chunks.choice(choice, usage)
        if body.includes_usage or self._state.settings.enable_force_include_usage:
            yield chunks.usage(counter.total())
        yield DONE

    def _drop(self, output: RequestOutput) -> None:
        if self._drops_output:
            for completion in output.outputs:
                completion.text, completion.token_ids, completion.logprobs = "", [], []

    @property
    def body(self) -> CompletionRequest:
        return self._body

    def index(self, prompt_index: int, choice_index: int) -> int:
        return prompt_index * self._num_choices + choice_index

    def logprobs(
        self, output: RequestOutput, completion: CompletionOutput, offset: int, *, with_prompt: bool
    ) -> dict[str, Any] | None:
        top = self._body.top
        if top is None:
            return None
        ids = list(completion.token_ids)
        positions = [*(completion.logprobs or ())]
        if with_prompt:
            ids = [*output.prompt_token_ids, *ids]
            positions = [*(output.prompt_logprobs or ()), *positions]
        return openai_render.completion_logprobs(ids, positions, top, self._text_of, offset)


@dataclass(slots=True)
class _ChoiceWriter:
    """Writes one choice, whole or in pieces: the echoed prompt comes with the first piece."""

    run: _Run
    prompt_index: int
    choice_index: int
    has_echoed: bool = False
    num_chars: int = 0

    @property
    def index(self) -> int:
        return self.run.index(self.prompt_index, self.choice_index)

    def choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        body = self.run.body
        echoes = body.echo and not self.has_echoed
        text = completion.text
        if echoes:
            self.has_echoed = True
            text = (output.prompt or "") + text
        choice: dict[str, Any] = {
            "index": self.index,
            "text": text,
            "logprobs": self.run.logprobs(output, completion, self.num_chars, with_prompt=echoes),
            **openai_render.stop_fields(completion),
        }
        self.num_chars += len(text)
        if body.return_token_ids:
            choice["token_ids"] = list(completion.token_ids)
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice
