"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jengine.errors import InvalidRequestError
from jengine.outputs import CompletionOutput, RequestOutput
from jengine.request import SamplingParams
from jengine.server import openai_beams, openai_render, openai_run
from jengine.server.http_errors import json_response
from jengine.server.http_io import DONE, EventStream, read_body, unless_gone
from jengine.server.openai_messages import MessageFormat, MessageWriter, message_format
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
    settings = state.settings
    body.check_chat(
        trust_template=settings.trust_request_chat_template,
        takes_tools=settings.enable_auto_tool_choice,
    )
    prepared = await render(state, body)
    sampling = build_sampling(state, body, prepared)
    is_constrained = sampling.structured_outputs is not None
    form = message_format(settings, body, prepared.text or "", is_constrained=is_constrained)
    if not form.is_plain:  # the tags may be special tokens
        sampling.skip_special_tokens = False
    response_id = openai_run.response_id("chatcmpl", request, body)
    beams = openai_beams.build_beams(state, body, [prepared.token_ids], sampling.max_tokens)
    requests = openai_run.submissions([prepared], sampling, response_id, body, ENDPOINT, beams)
    answer = _Answer(state, body, form, response_id)
    try:
        if body.stream:
            outputs = await unless_gone(request, openai_run.peeked(state, requests))
            events = answer.events(outputs)
            return EventStream(events, outputs, settings.ping_seconds)
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

    def __init__(
        self, state: ServerState, body: ChatRequest, form: MessageFormat, response_id: str
    ) -> None:
        self._state = state
        self._body = body
        self._form = form
        self._text_of = openai_run.token_text(state, body)
        self._bytes_of = state.ready_engine().tokenizer.id_to_bytes
        self._counter = UsageCounter(state.settings.enable_prompt_tokens_details)
        self._id = response_id
        self._chunks = openai_render.ChunkWriter(
            "chat.completion.chunk", response_id, state.model_name
        )

    def whole(self, final: RequestOutput) -> dict[str, Any]:
        self._counter.add(0, final)
        result: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._chunks.created,
            "model": self._state.model_name,
            "choices": [self._choice(completion) for completion in final.outputs],
            "usage": self._counter.total(),
        }
        if self._body.prompt_logprobs is not None:
            result["prompt_logprobs"] = openai_render.prompt_logprobs(final)
        if self._body.return_token_ids:
            result["prompt_token_ids"] = final.prompt_token_ids
        return result

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        writer = self._form.writer()
        message = writer.whole(completion.text, self._echoed_text())
        return {
            "index": completion.index,
            "message": {"role": ROLE, **message},
            **self._fields(completion, writer),
        }

    async def events(self, outputs: Outputs) -> AsyncGenerator[bytes, None]:
        body = self._body
        writers: dict[int, MessageWriter] = {}
        async for _, output in outputs:
            self._counter.add(0, output)
            for completion in output.outputs:
                index = completion.index
                if index not in writers:
                    writers[index] = self._form.writer()
                    for delta in self._first_deltas():
                        yield self._chunk(index, delta)
                for event in self._events_of(completion, writers[index]):
                    yield event
        if body.includes_usage or self._state.settings.enable_force_include_usage:
            yield self._chunks.usage(self._counter.total())
        yield DONE

    def _events_of(self, completion: CompletionOutput, writer: MessageWriter) -> Iterator[bytes]:
        body, index, is_last = self._body, completion.index, completion.finish_reason is not None
        has_fields = bool(
            body.top is not None or body.return_token_ids or body.has_continuous_usage
        )
        deltas = writer.deltas(completion.text, is_last=is_last)
        last = None  # has the fields
        if is_last or has_fields:
            last = deltas.pop() if deltas else {"content": ""}
        for delta in deltas:
            if delta.keys() == {"content"} and not has_fields:
                yield self._chunks.chat_text(index, delta["content"])
            else:
                yield self._chunk(index, delta)
        if last is not None:
            yield self._chunk(index, last, **self._fields(completion, writer))

    def _first_deltas(self) -> list[dict[str, str]]:
        deltas = [{"role": ROLE, "content": ""}]
        if echoed := self._echoed_text():
            deltas.append({"content": echoed})
        return deltas

    def _chunk(self, index: int, delta: dict[str, Any], **fields: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
        usage = self._counter.total() if self._body.has_continuous_usage else None
        return self._chunks.choice(choice, usage)

    def _fields(self, completion: CompletionOutput, writer: MessageWriter) -> dict[str, Any]:
        """Of a choice, beside its message. After the message: it decides why it ended."""
        return {
            "logprobs": self._logprobs(completion),
            **openai_render.stop_fields(completion),
            "finish_reason": writer.finish_reason(completion.finish_reason),
            **self._token_ids(completion),
        }

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
