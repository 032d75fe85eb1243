"""jengine.v1.Inference: protobuf in, `AsyncEngine`, protobuf out."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc

from jengine import __version__
from jengine.errors import InvalidRequestError
from jengine.request import SamplingParams
from jengine.server.grpc_errors import answered
from jengine.server.inference_convert import (
    ResponseBuilder,
    to_messages,
    to_sampling_params,
    to_template_kwargs,
)
from jengine.server.proto import engine_pb2, engine_pb2_grpc
from jengine.server.state import ServerState, Status, check_request_id, new_request_id
from jengine.server.tracking import Submission, tracked

SERVICE_NAME = engine_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


class InferenceService(engine_pb2_grpc.InferenceServicer):
    """No logic of its own: every decision is the engine's."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def Generate(
        self, request: engine_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.GenerateResponse]:
        async with answered(context):
            self._state.check_model(request.model)
            engine = self._state.serving_engine()
            sampling = to_sampling_params(request.sampling, request.output)
            text: str | None = None
            if request.WhichOneof("prompt") == "text":
                text = request.text
                add_special = (
                    request.add_special_tokens if request.HasField("add_special_tokens") else True
                )
                ids = await engine.encode(text, add_special_tokens=add_special)
            elif request.WhichOneof("prompt") == "token_ids":
                ids = list(request.token_ids.ids)
            else:
                raise InvalidRequestError("prompt", "set text or token_ids")
            async with aclosing(
                self._stream(request, context, ids, text, sampling, "grpc.Generate")
            ) as responses:
                async for response in responses:
                    yield response

    async def Chat(
        self, request: engine_pb2.ChatRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.GenerateResponse]:
        async with answered(context):
            self._state.check_model(request.model)
            engine = self._state.serving_engine()
            sampling = to_sampling_params(request.sampling, request.output, max_tokens=None)
            add_generation_prompt = (
                request.add_generation_prompt
                if request.HasField("add_generation_prompt")
                else not request.continue_final_message
            )
            text = await engine.render_chat(
                to_messages(request.messages),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **to_template_kwargs(request.chat_template_kwargs_json),
            )
            ids = await engine.encode(text, add_special_tokens=False)
            async with aclosing(
                self._stream(request, context, ids, text, sampling, "grpc.Chat")
            ) as responses:
                async for response in responses:
                    yield response

    async def Tokenize(
        self, request: engine_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.TokenizeResponse:
        async with answered(context):
            self._state.check_model(request.model)
            engine = self._state.ready_engine()
            is_text = request.WhichOneof("input") == "text"
            if is_text:
                text = request.text
            elif request.WhichOneof("input") == "conversation":
                conversation = request.conversation
                text = await engine.render_chat(
                    to_messages(conversation.messages),
                    add_generation_prompt=(
                        conversation.add_generation_prompt
                        if conversation.HasField("add_generation_prompt")
                        else not conversation.continue_final_message
                    ),
                    continue_final_message=conversation.continue_final_message,
                )
            else:
                raise InvalidRequestError("input", "set text or conversation")
            add_special = (
                request.add_special_tokens if request.HasField("add_special_tokens") else is_text
            )
            ids = await engine.encode(text, add_special_tokens=add_special)
            tokens = [engine.tokenizer.id_to_token(i) for i in ids] if request.return_tokens else []
            return engine_pb2.TokenizeResponse(
                token_ids=ids, tokens=tokens, max_model_len=engine.model_info.max_model_len
            )

    async def Detokenize(
        self, request: engine_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.DetokenizeResponse:
        async with answered(context):
            self._state.check_model(request.model)
            engine = self._state.ready_engine()
            vocab_size = engine.model_info.vocab_size
            for token_id in request.token_ids:
                if token_id >= vocab_size:
                    raise InvalidRequestError(
                        "token_ids",
                        f"token id {token_id} is outside the vocabulary [0, {vocab_size})",
                    )
            text = await engine.decode(
                list(request.token_ids), skip_special_tokens=request.skip_special_tokens
            )
            return engine_pb2.DetokenizeResponse(text=text)

    async def ServerInfo(
        self, request: engine_pb2.ServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.ServerInfoResponse:
        async with answered(context):
            engine = self._state.ready_engine()
            info, stats, config = engine.model_info, engine.stats, self._state.config
            return engine_pb2.ServerInfoResponse(
                version=__version__,
                model=engine_pb2.ModelDescription(
                    served_names=info.served_model_names,
                    architecture=info.architecture,
                    vocab_size=info.vocab_size,
                    max_model_len=info.max_model_len,
                    eos_token_ids=info.eos_token_ids,
                    dtype=info.dtype,
                    default_sampling_params_json=json.dumps(info.default_sampling_params),
                ),
                limits=engine_pb2.EngineLimits(
                    max_num_seqs=config.scheduler.max_num_seqs,
                    max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
                    max_num_waiting=config.scheduler.max_num_waiting,
                    max_logprobs=config.max_logprobs,
                    page_size=engine.ready.page_size,
                    num_pages=engine.ready.num_pages,
                ),
                load=engine_pb2.EngineLoad(
                    num_running=stats.num_running,
                    num_waiting=stats.num_waiting,
                    num_pages_used=stats.num_pages_used,
                    is_draining=self._state.status is Status.DRAINING,
                ),
                memory_plan=engine.ready.memory_plan,
                uptime_seconds=self._state.uptime_seconds,
            )

    async def _stream(
        self,
        request: engine_pb2.GenerateRequest | engine_pb2.ChatRequest,
        context: grpc.aio.ServicerContext,
        ids: list[int],
        text: str | None,
        sampling: SamplingParams,
        endpoint: str,
    ) -> AsyncGenerator[engine_pb2.GenerateResponse, None]:
        request_id = request.request_id or new_request_id("req-")
        submission = Submission(
            request_id=check_request_id(request_id),
            prompt_token_ids=ids,
            prompt=text,
            sampling=sampling,
            endpoint=endpoint,
            priority=request.priority,
            cache_salt=request.cache_salt,
            deadline=deadline_of(context),
        )
        builder = ResponseBuilder(request_id, request.output)
        async with aclosing(tracked(self._state, submission)) as outputs:
            async for output in outputs:
                for completion in output.outputs:
                    yield builder.build(output, completion)


def deadline_of(context: grpc.aio.ServicerContext) -> float | None:
    """When the caller stops waiting, on `time.monotonic()`'s clock; None if it never does."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
