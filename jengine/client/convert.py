"""Between jengine.v1 messages and the client's types. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc
import msgspec
from google.rpc import error_details_pb2, status_pb2

from jengine.client.types import (
    CallOptions,
    Delta,
    Finish,
    Position,
    Prompt,
    RpcFailedError,
    ServerInfo,
    TokenLogprob,
)
from jengine.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineDrainingError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    UnsupportedError,
)
from jengine.request import RepetitionDetectionParams
from jengine.server.proto import engine_pb2 as pb
from jengine.structured_outputs import StructuredOutputsParams

_REASONS = {
    pb.Finish.REASON_STOP: "stop",
    pb.Finish.REASON_LENGTH: "length",
    pb.Finish.REASON_ABORT: "abort",
    pb.Finish.REASON_ERROR: "error",
    pb.Finish.REASON_REPETITION: "repetition",
}


def from_rpc_error(error: Any) -> Exception:
    """The error of `jengine.errors` that the server raised."""
    code, message = error.code(), error.details() or ""
    fields, reason = _details(error)
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT if fields:
            return InvalidRequestError(*fields[0])
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequestError("request", message)
        case grpc.StatusCode.NOT_FOUND:
            return ModelNotFoundError(message)
        case grpc.StatusCode.ALREADY_EXISTS:
            return DuplicateRequestError(message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if reason == "QUEUE_FULL":
            return QueueFullError(message)
        case grpc.StatusCode.UNAVAILABLE if reason == "DRAINING":
            return EngineDrainingError(message)
        case grpc.StatusCode.UNAVAILABLE if reason == "ENGINE_DEAD":
            return EngineDeadError(message)
        case grpc.StatusCode.UNIMPLEMENTED:
            return UnsupportedError(message)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return TimeoutError(message)
    return RpcFailedError(code.name, message)


def _details(error: Any) -> tuple[list[tuple[str, str]], str]:
    """Field violations and the reason, from the trailer."""
    fields: list[tuple[str, str]] = []
    reason = ""
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        for packed in status_pb2.Status.FromString(value).details:
            bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
            if packed.Unpack(bad):
                fields += [(v.field, v.description) for v in bad.field_violations]
            elif packed.Unpack(info):
                reason = info.reason
    return fields, reason


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def _sampling(fields: Mapping[str, Any]) -> pb.SamplingParams:
    given = {name: value for name, value in fields.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if isinstance(constraint := given.get("structured_outputs"), StructuredOutputsParams):
        given["structured_outputs"] = _structured_outputs(constraint)
    if isinstance(detection := given.get("repetition_detection"), RepetitionDetectionParams):
        given["repetition_detection"] = msgspec.structs.asdict(detection)
    try:
        if (extra_args := given.pop("extra_args", None)) is not None:
            given["extra_args_json"] = json.dumps(extra_args)
        return pb.SamplingParams(**given)
    except (
        ValueError,
        TypeError,
    ) as error:  # an unknown field, a wrong type, or out of the field's range
        raise InvalidRequestError("sampling", str(error)) from None


def _structured_outputs(params: StructuredOutputsParams) -> pb.StructuredOutputs:
    fields = {
        name: value
        for name, value in msgspec.structs.asdict(params).items()
        if value not in (None, False)
    }
    if isinstance(schema := fields.get("json"), dict):
        fields["json"] = json.dumps(schema)
    if (choice := fields.get("choice")) is not None:
        fields["choice"] = pb.Choices(values=choice)
    return pb.StructuredOutputs(**fields)


def _output(options: CallOptions) -> pb.OutputOptions:
    return pb.OutputOptions(
        final_only=options.final_only, prompt_token_ids=options.prompt_token_ids
    )


def generate_request(
    prompt: str | Sequence[int], options: CallOptions, sampling: Mapping[str, Any]
) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        request_id=options.request_id,
        model=options.model,
        sampling=_sampling(sampling),
        output=_output(options),
        priority=options.priority,
        cache_salt=options.cache_salt,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        try:
            request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
        except (ValueError, TypeError) as error:
            raise InvalidRequestError("prompt", str(error)) from None
    return request


def chat_request(
    messages: Iterable[Mapping[str, str]], options: CallOptions, sampling: Mapping[str, Any]
) -> pb.ChatRequest:
    return pb.ChatRequest(
        request_id=options.request_id,
        model=options.model,
        messages=[pb.ChatMessage(**message) for message in messages],
        sampling=_sampling(sampling),
        output=_output(options),
        priority=options.priority,
        cache_salt=options.cache_salt,
    )


def to_delta(response: pb.GenerateResponse) -> Delta:
    prompt = None
    if response.HasField("prompt"):
        prompt = Prompt(
            response.prompt.num_tokens,
            tuple(response.prompt.token_ids),
            tuple(_position(position) for position in response.prompt.logprobs),
        )
    return Delta(
        request_id=response.request_id,
        index=response.index,
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(_position(position) for position in response.logprobs),
        prompt=prompt,
        finish=_finish(response.finish) if response.HasField("finish") else None,
    )


def _position(position: pb.PositionLogprobs) -> Position:
    return tuple(TokenLogprob(c.token_id, c.logprob, c.rank, c.token) for c in position.candidates)


def _finish(finish: pb.Finish) -> Finish:
    which = finish.WhichOneof("stop")
    timings = finish.timings

    def seconds(name: Any) -> float | None:
        return getattr(timings, name) if timings.HasField(name) else None

    return Finish(
        reason=_REASONS.get(finish.reason, "error"),
        stop=None if which is None else getattr(finish, which),
        prompt_tokens=finish.usage.prompt_tokens,
        completion_tokens=finish.usage.completion_tokens,
        cached_tokens=finish.usage.cached_tokens,
        queue_seconds=seconds("queue_seconds"),
        time_to_first_token=seconds("time_to_first_token_seconds"),
        decode_seconds=seconds("decode_seconds"),
        total_seconds=seconds("total_seconds"),
        num_preemptions=timings.num_preemptions,
    )


def to_server_info(info: pb.ServerInfoResponse) -> ServerInfo:
    def as_dict(message: Any) -> dict[str, int]:
        return {f.name: getattr(message, f.name) for f in message.DESCRIPTOR.fields}

    return ServerInfo(
        version=info.version,
        served_names=tuple(info.model.served_names),
        architecture=info.model.architecture,
        vocab_size=info.model.vocab_size,
        max_model_len=info.model.max_model_len,
        eos_token_ids=tuple(info.model.eos_token_ids),
        dtype=info.model.dtype,
        default_sampling_params=json.loads(info.model.default_sampling_params_json or "{}"),
        limits=as_dict(info.limits),
        load=as_dict(info.load),
        memory_plan=info.memory_plan,
        uptime_seconds=info.uptime_seconds,
    )
