"""Between vllm.grpc.engine messages (smg-grpc-proto) and jengine's own types. Pure functions.

That proto gives proto zeros meanings: top_p 0 is 1, repetition_penalty 0 is 1, n 0 is 1,
temperature not set is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from smg_grpc_proto import vllm_engine_pb2 as pb

from jengine.errors import InvalidRequestError
from jengine.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from jengine.request import RequestOutputKind, SamplingParams
from jengine.structured_outputs import StructuredOutputsParams

# What this server cannot do, by message field.
_UNSUPPORTED_INPUTS = ("mm_inputs", "media_refs", "extra_mm_inputs")
_UNSUPPORTED_TRANSFERS = ("kv_transfer_params", "kv_transfer_params_json")


def check_supported(request: pb.GenerateRequest) -> None:
    """Refuse what a text model on one device cannot honour, naming the field."""
    for name in _UNSUPPORTED_INPUTS:
        if _is_set(request, name):
            raise InvalidRequestError(name, "this model takes text only")
    for name in _UNSUPPORTED_TRANSFERS:
        if _is_set(request, name):
            raise InvalidRequestError(name, "this server does not transfer KV caches")
    if request.HasField("data_parallel_rank") and request.data_parallel_rank != 0:
        raise InvalidRequestError(
            "data_parallel_rank",
            f"must be 0: ranks are chosen by load, got {request.data_parallel_rank}",
        )


def to_sampling_params(params: pb.SamplingParams, *, stream: bool) -> SamplingParams:
    # The gateway detokenises: text is needed here only to find stop strings.
    return SamplingParams(
        n=params.n or 1,
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_p=params.top_p or 1.0,
        top_k=params.top_k,
        min_p=params.min_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty or 1.0,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        min_tokens=params.min_tokens,
        stop=list(params.stop) or None,
        stop_token_ids=list(params.stop_token_ids) or None,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        seed=params.seed if params.HasField("seed") else None,
        include_stop_str_in_output=params.include_stop_str_in_output,
        logit_bias=dict(params.logit_bias) or None,
        truncate_prompt_tokens=(
            params.truncate_prompt_tokens if params.HasField("truncate_prompt_tokens") else None
        ),
        structured_outputs=to_structured_outputs(params),
        detokenize=bool(params.stop),
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )


def constraint_field(params: pb.SamplingParams) -> str:
    """What errors call the request's constraint."""
    return f"sampling_params.{params.WhichOneof('constraint') or 'constraint'}"


def to_structured_outputs(params: pb.SamplingParams) -> StructuredOutputsParams | None:
    """Starts with the first token, as `grammar_from_first_token` asks: there is no reasoning parser
    here."""
    kind = params.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not params.json_object):
        return None
    value: Any = list(params.choice.choices) if kind == "choice" else getattr(params, kind)
    try:
        return StructuredOutputsParams(**{"json" if kind == "json_schema" else kind: value})
    except InvalidRequestError as error:
        raise InvalidRequestError(constraint_field(params), error.message) from None


class ResponseBuilder:
    """Builds the messages of one stream: chunks and a `complete` per choice, or only the latter."""

    def __init__(self, *, stream: bool) -> None:
        self._stream = stream
        self._num_tokens: dict[int, int] = {}
        self._input_logprobs: pb.InputLogProbs | None = None

    def build(
        self, output: RequestOutput, completion: CompletionOutput
    ) -> Iterable[pb.GenerateResponse]:
        index, count = completion.index, len(completion.token_ids)
        if output.prompt_logprobs is not None:
            self._input_logprobs = to_input_logprobs(
                output.prompt_token_ids, output.prompt_logprobs
            )
        is_first = index not in self._num_tokens
        self._num_tokens[index] = self._num_tokens.get(index, 0) + count
        if self._stream and (count or is_first):
            yield pb.GenerateResponse(chunk=self._chunk(output, completion, is_first))
        if completion.finish_reason is not None:
            yield pb.GenerateResponse(complete=self._complete(output, completion))

    def _chunk(
        self, output: RequestOutput, completion: CompletionOutput, is_first: bool
    ) -> pb.GenerateStreamChunk:
        return pb.GenerateStreamChunk(
            token_ids=completion.token_ids,
            prompt_tokens=len(output.prompt_token_ids),
            completion_tokens=len(completion.token_ids),
            cached_tokens=output.num_cached_tokens or 0,
            output_logprobs=to_output_logprobs(completion),
            input_logprobs=self._input_logprobs if is_first else None,
            index=completion.index,
        )

    def _complete(self, output: RequestOutput, completion: CompletionOutput) -> pb.GenerateComplete:
        """In a stream the chunks have carried ids and logprobs already."""
        whole = not self._stream
        complete = pb.GenerateComplete(
            output_ids=completion.token_ids if whole else (),
            finish_reason=completion.finish_reason or "error",
            prompt_tokens=len(output.prompt_token_ids),
            completion_tokens=self._num_tokens[completion.index],
            cached_tokens=output.num_cached_tokens or 0,
            output_logprobs=to_output_logprobs(completion) if whole else None,
            input_logprobs=self._input_logprobs if whole else None,
            index=completion.index,
        )
        if isinstance(completion.stop_reason, str):
            complete.matched_stop_str = completion.stop_reason
        elif completion.stop_reason is not None:
            complete.matched_token_id = completion.stop_reason
        return complete


def to_output_logprobs(completion: CompletionOutput) -> pb.OutputLogProbs | None:
    if completion.logprobs is None:
        return None
    result = pb.OutputLogProbs(token_ids=completion.token_ids)
    for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
        result.token_logprobs.append(position[token_id].logprob)
        result.top_logprobs.append(_top(position))
    return result


def to_input_logprobs(
    token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]
) -> pb.InputLogProbs:
    result = pb.InputLogProbs(token_ids=token_ids)
    for token_id, position in zip(token_ids, positions, strict=True):
        if position is None:  # nothing predicts the first token
            result.token_logprobs.add()
            result.top_logprobs.add()
        else:
            result.token_logprobs.add(value=position[token_id].logprob)
            result.top_logprobs.append(_top(position))
    return result


def _top(position: PositionLogprobs) -> pb.TopLogProbs:
    best = sorted(position.items(), key=lambda item: item[1].rank or 0)
    return pb.TopLogProbs(
        values=[value.logprob for _, value in best], token_ids=[token_id for token_id, _ in best]
    )


def _is_set(request: pb.GenerateRequest, name: str) -> bool:
    return any(field.name == name for field, _ in request.ListFields())
