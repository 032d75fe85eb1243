"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jengine.errors import InvalidRequestError
from jengine.outputs import CompletionOutput, RequestOutput
from jengine.request import SamplingParams
from jengine.server import openai_beams, openai_render, openai_run
from jengine.server.http_errors import json_response
from jengine.server.http_io import DONE, EventStream, read_body, unless_gone
from jengine.server.openai_protocol import ChatRequest
from jengine.server.openai_run import Outputs, Prepared, UsageCounter
from jengine.server.state import ServerState

ENDPOINT = "/v1/chat/completions"
ROLE = "assistant"


async def chat_completions(request: Request) -> Response:
    state: ServerState = request.app.state.server
    body = await read_body(request, ChatRequest)
    state.check_model(body.model)
    state.serving_engine()
    body.check_chat(trust_template=state.settings.trust_request_chat_template)
    prepared = await render(state, body)
    sampling = build_sampling(state, body, prepared)
    response_id = openai_run.response_id("chatcmpl", request, body)
    beams = openai_beams.build_beams(state, body, [prepared.token_ids], sampling.max_tokens)
    requests = openai_run.submissions([prepared], sampling, response_id, body, ENDPOINT, beams)
    answer = _Answer(state, body, response_id)
    try:
        if body.stream:
            outputs = await unless_gone(request, openai_run.peeked(state, requests))
            events = answer.events(outputs)
            return EventStream(events, outputs, state.settings.ping_seconds)
        (final,) = await unless_gone(request, openai_run.collected(state, requests))
    except InvalidRequestError as error:
        raise _about_messages(error) from None
    return json_response(answer.whole(final))


async def render(state: ServerState, body: ChatRequest) -> Prepared:
    """The conversation as the model reads it."""
    engine = state.ready_engine()
    messages = [message.render(index) for index, message in enumerate(body.messages)]
    try:
        text = await engine.render_chat(messages, **body.template_arguments())
    except InvalidRequestError as error:
        raise _about_messages(error) from None
    ids = await engine.encode(text, add_special_tokens=body.add_special_tokens)
    return Prepared(ids, text)


def build_sampling(state: ServerState, body: ChatRequest, prepared: Prepared) -> SamplingParams:
    info = state.ready_engine().model_info
    max_tokens = body.max_completion_tokens
    if max_tokens is None:
        max_tokens = body.max_tokens
    if body.truncate_prompt_tokens is None:
        openai_run.check_length(prepared, max_tokens, info.max_model_len, "messages")
    if max_tokens is None:
        max_tokens = info.default_sampling_params.get("max_tokens")
    num_top = body.top_logprobs
    if num_top is None and body.logprobs and not body.logprob_token_ids:
        num_top = 0
    return body.build_sampling(
        info.default_sampling_params,
        max_tokens=max_tokens,
        logprobs=num_top,
        prompt_logprobs=body.prompt_logprobs,
    )


class _Answer:
    """Writes the answer to one request, whole or as events."""

    def __init__(self, state: ServerState, body: ChatRequest, response_id: str) -> None:
        self._state = state
        self._body = body
        self._text_of = openai_run.token_text(state, body)
        self._bytes_of = state.ready_engine().tokenizer.id_to_bytes
        self._counter = UsageCounter(state.settings.enable_prompt_tokens_details)
        self._id = response_id
        self._chunks = openai_render.ChunkWriter(
            "chat.completion.chunk", response_id, state.model_name
        )

    def whole(self, final: RequestOutput) -> dict[str, Any]:
        self._counter.add(0, final)
        echoed = self._echoed_text()
        result: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._chunks.created,
            "model": self._state.model_name,
            "choices": [
                {
                    "index": completion.index,
                    "message": {"role": ROLE, "content": echoed + completion.text},
                    "logprobs": self._logprobs(completion),
                    **openai_render.stop_fields(completion),
                    **self._token_ids(completion),
                }
                for completion in final.outputs
            ],
            "usage": self._counter.total(),
        }
        if self._body.prompt_logprobs is not None:
            result["prompt_logprobs"] = openai_render.prompt_logprobs(final)
        if self._body.return_token_ids:
            result["prompt_token_ids"] = final.prompt_token_ids
        return result

    async def events(self, outputs: Outputs) -> AsyncGenerator[bytes, None]:
        body = self._body
        has_extras = bool(
            body.top is not None or body.return_token_ids or body.has_continuous_usage
        )
        started: set[int] = set()
        async for _, output in outputs:
            self._counter.add(0, output)
            for completion in output.outputs:
                index = completion.index
                if index not in started:
                    started.add(index)
                    for delta in self._first_deltas():
                        yield self._chunk(index, delta)
                if completion.finish_reason is None and not has_extras:
                    if completion.text:
                        yield self._chunks.chat_text(index, completion.text)
                    continue
                yield self._chunk(
                    index,
                    {"content": completion.text},
                    logprobs=self._logprobs(completion),
                    **openai_render.stop_fields(completion),
                    **self._token_ids(completion),
                )
        if body.includes_usage or self._state.settings.enable_force_include_usage:
            yield self._chunks.usage(self._counter.total())
        yield DONE

    def _first_deltas(self) -> list[dict[str, str]]:
        deltas = [{"role": ROLE, "content": ""}]
        if echoed := self._echoed_text():
            deltas.append({"content": echoed})
        return deltas

    def _chunk(self, index: int, delta: dict[str, str], **fields: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
        usage = self._counter.total() if self._body.has_continuous_usage else None
        return self._chunks.choice(choice, usage)

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        top = self._body.top
        if completion.logprobs is None or top is None:
            return None
        return openai_render.chat_logprobs(
            completion.token_ids, completion.logprobs, top, self._text_of, self._bytes_of
        )

    def _token_ids(self, completion: CompletionOutput) -> dict[str, Any]:
        return {"token_ids": list(completion.token_ids)} if self._body.return_token_ids else {}

    def _echoed_text(self) -> str:
        """vLLM: echo repeats the last message, which makes sense when the model continued it."""
        last = self._body.messages[-1]
        if not self._body.echo or last.role != ROLE:
            return ""
        return last.render(len(self._body.messages) - 1)["content"]


def _about_messages(error: InvalidRequestError) -> InvalidRequestError:
    """The prompt of a conversation is its messages."""
    if error.field in ("prompt", "prompt_token_ids"):
        return InvalidRequestError("messages", error.message)
    return error
