"""Between jengine.v1 messages and jengine's own types. Pure functions."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from jengine.errors import InvalidRequestError
from jengine.outputs import CompletionOutput, PositionLogprobs, RequestOutput, RequestTimings
from jengine.request import RepetitionDetectionParams, RequestOutputKind, SamplingParams
from jengine.server.proto import engine_pb2
from jengine.server.request_limits import check_template_variables
from jengine.structured_outputs import StructuredOutputsParams

_OPTIONAL_FIELDS = (
    *(
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
    ),
    *("repetition_penalty", "max_tokens", "min_tokens", "include_stop_str_in_output", "ignore_eos"),
    *("logprobs", "prompt_logprobs", "truncate_prompt_tokens", "skip_special_tokens"),
    *("spaces_between_special_tokens", "thinking_token_budget"),
)
TEMPLATE_FIELD = "chat_template_kwargs_json"
EXTRA_ARGS_FIELD = "extra_args_json"
_REPEATED_FIELDS = (
    *("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logprob_token_ids"),
)

_REASONS = {
    "stop": engine_pb2.Finish.REASON_STOP,
    "length": engine_pb2.Finish.REASON_LENGTH,
    "abort": engine_pb2.Finish.REASON_ABORT,
    "error": engine_pb2.Finish.REASON_ERROR,
    "repetition": engine_pb2.Finish.REASON_REPETITION,
}


def to_sampling_params(
    message: engine_pb2.SamplingParams, output: engine_pb2.OutputOptions, **defaults: Any
) -> SamplingParams:
    """What is set in the message, over `defaults`, over SamplingParams' own."""
    fields: dict[str, Any] = dict(defaults)
    for name in _OPTIONAL_FIELDS:
        if message.HasField(name):  # type: ignore[arg-type]
            fields[name] = getattr(message, name)
    for name in _REPEATED_FIELDS:
        if values := list(getattr(message, name)):
            fields[name] = values
    if message.HasField("structured_outputs"):
        fields["structured_outputs"] = to_structured_outputs(message.structured_outputs)
    if message.HasField("repetition_detection"):
        detection = message.repetition_detection
        fields["repetition_detection"] = RepetitionDetectionParams(
            max_pattern_size=detection.max_pattern_size,
            min_pattern_size=detection.min_pattern_size,
            min_count=detection.min_count,
        )
    if message.HasField("extra_args_json"):
        fields["extra_args"] = to_extra_args(message.extra_args_json)
    if message.logit_bias:
        fields["logit_bias"] = dict(message.logit_bias)
    fields["detokenize"] = wants_text(output) or bool(message.stop)
    fields["output_kind"] = (
        RequestOutputKind.FINAL_ONLY if output.final_only else RequestOutputKind.DELTA
    )
    return SamplingParams(**fields)


def to_structured_outputs(message: engine_pb2.StructuredOutputs) -> StructuredOutputsParams:
    fields: dict[str, Any] = {}
    if kind := message.WhichOneof("constraint"):
        value = getattr(message, kind)
        fields[kind] = list(value.values) if kind == "choice" else value
    if message.HasField("whitespace_pattern"):
        fields["whitespace_pattern"] = message.whitespace_pattern
    return StructuredOutputsParams(
        **fields,
        disable_any_whitespace=message.disable_any_whitespace,
        disable_additional_properties=message.disable_additional_properties,
    )


def to_extra_args(text: str) -> dict[str, Any]:
    """As over HTTP: no NaN, no infinity."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except RecursionError:
        raise InvalidRequestError(EXTRA_ARGS_FIELD, "is nested too deeply") from None
    except msgspec.ValidationError:
        raise InvalidRequestError(EXTRA_ARGS_FIELD, "must be a JSON object") from None
    except ValueError as error:  # msgspec's own, and of text that is no UTF-8
        raise InvalidRequestError(EXTRA_ARGS_FIELD, f"is not JSON: {error}") from None


def to_messages(messages: Any) -> list[dict[str, str]]:
    """Chat messages as templates take them."""
    if not messages:
        raise InvalidRequestError("messages", "must not be empty")
    result: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        if not message.role:
            raise InvalidRequestError(f"messages[{index}].role", "must not be empty")
        turn = {"role": message.role, "content": message.content}
        if message.name:
            turn["name"] = message.name
        result.append(turn)
    return result


def to_template_kwargs(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except RecursionError:
        raise InvalidRequestError(TEMPLATE_FIELD, "is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequestError(TEMPLATE_FIELD, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(TEMPLATE_FIELD, "must be a JSON object")
    check_template_variables(TEMPLATE_FIELD, value)
    return value


def wants_text(output: engine_pb2.OutputOptions) -> bool:
    return output.text if output.HasField("text") else True


def wants_token_ids(output: engine_pb2.OutputOptions) -> bool:
    return output.token_ids if output.HasField("token_ids") else True


class ResponseBuilder:
    """Builds the messages of one stream. Holds what only some of them carry: counts so far, whether
    one was sent.
    """

    def __init__(self, request_id: str, options: engine_pb2.OutputOptions) -> None:
        self._request_id = request_id
        self._options = options
        self._text = wants_text(options)
        self._token_ids = wants_token_ids(options)
        self._num_tokens: dict[int, int] = {}
        self._is_first = True

    def build(
        self, output: RequestOutput, completion: CompletionOutput
    ) -> engine_pb2.GenerateResponse:
        index = completion.index
        self._num_tokens[index] = self._num_tokens.get(index, 0) + len(completion.token_ids)
        message = engine_pb2.GenerateResponse(request_id=self._request_id, index=index)
        if self._text:
            message.text = completion.text
        if self._token_ids:
            message.token_ids.extend(completion.token_ids)
        for position in completion.logprobs or ():
            message.logprobs.append(to_position(position))
        if self._is_first:
            self._is_first = False
            message.prompt.CopyFrom(self._prompt(output))
        if completion.finish_reason is not None:
            message.finish.CopyFrom(self._finish(output, completion))
        return message

    def _prompt(self, output: RequestOutput) -> engine_pb2.PromptInfo:
        prompt = engine_pb2.PromptInfo(num_tokens=len(output.prompt_token_ids))
        if self._options.prompt_token_ids:
            prompt.token_ids.extend(output.prompt_token_ids)
        for position in output.prompt_logprobs or ():
            prompt.logprobs.append(to_position(position or {}))
        return prompt

    def _finish(self, output: RequestOutput, completion: CompletionOutput) -> engine_pb2.Finish:
        finish = engine_pb2.Finish(
            reason=_REASONS[completion.finish_reason or "error"],
            usage=engine_pb2.Usage(
                prompt_tokens=len(output.prompt_token_ids),
                completion_tokens=self._num_tokens[completion.index],
                cached_tokens=output.num_cached_tokens or 0,
            ),
        )
        if completion.finish_reason != "stop":
            pass  # the reason of a repetition is no text of the completion
        elif isinstance(completion.stop_reason, str):
            finish.stop_text = completion.stop_reason
        elif completion.stop_reason is not None:
            finish.stop_token_id = completion.stop_reason
        if output.metrics is not None:
            finish.timings.CopyFrom(to_timings(output.metrics))
        return finish


def to_position(position: PositionLogprobs) -> engine_pb2.PositionLogprobs:
    return engine_pb2.PositionLogprobs(
        candidates=[
            engine_pb2.TokenLogprob(
                token_id=token_id,
                logprob=value.logprob,
                rank=value.rank or 0,
                token=value.decoded_token or "",
            )
            for token_id, value in position.items()
        ]
    )


def to_timings(timings: RequestTimings) -> engine_pb2.Timings:
    end = timings.last_token_time or timings.finished_time
    message = engine_pb2.Timings(num_preemptions=timings.num_preemptions)
    if (queue := timings.queue_time) is not None:
        message.queue_seconds = queue
    if (first := timings.time_to_first_token) is not None:
        message.time_to_first_token_seconds = first
    if end is not None:
        message.total_seconds = end - timings.arrival_time
        if timings.first_token_time is not None:
            message.decode_seconds = end - timings.first_token_time
    return message
