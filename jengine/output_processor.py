"""From the core's tokens to the user's text: detokenising, stop strings, logprobs, and n
completions in one stream.

`OutputProcessor` keeps one `RequestState` for each request in flight. Nothing is queued for a
reader: the state grows with each step, and `RequestState.take` builds an output of what is new when
the reader comes for it. A slow reader therefore gets fewer, larger outputs, loses nothing, and
costs no memory beyond the tokens themselves.
"""

from collections.abc import Callable

from jengine.errors import DuplicateRequestError, InvalidRequestError, JengineError, QueueFullError
from jengine.input_processor import PreparedRequest
from jengine.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestOutput,
    RequestTimings,
)
from jengine.protocol import CoreOutput, LogprobsData, Refusal, StepOutputs
from jengine.request import FinishReason, RequestOutputKind
from jengine.text.detokenizer import IncrementalDetokenizer
from jengine.text.stop import StopChecker
from jengine.text.tokenizer import Tokenizer


class OutputProcessor:
    """All requests in flight. Owned by one thread (the event loop, or the caller of `LLM`)."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, RequestState] = {}
        self._completions: dict[
            str, tuple[RequestState, CompletionState]
        ] = {}  # by the core's request id

    @property
    def requests(self) -> "dict[str, RequestState]":
        """Unfinished requests by id. Do not write."""
        return self._requests

    def add(self, prepared: PreparedRequest) -> "RequestState":
        """Start to follow a request. Raises `DuplicateRequestError` if its id is in flight."""
        if prepared.request_id in self._requests:
            raise DuplicateRequestError(f"request_id {prepared.request_id!r} is in flight")
        state = RequestState(prepared, self._tokenizer)
        self._requests[prepared.request_id] = state
        for core_id, completion in zip(state.core_ids, state.completions, strict=True):
            self._completions[core_id] = state, completion
        return state

    def process(self, message: StepOutputs) -> "tuple[list[RequestState], list[str]]":
        """Take in one step.

        Returns the requests that changed, and the core's ids that a stop string has ended.
        """
        changed: dict[str, RequestState] = {}
        stopped: list[str] = []
        for output in message.outputs:
            found = self._completions.get(output.request_id)
            if found is None:
                continue  # ended here already; the core was a step ahead
            state, completion = found
            state.note_progress(output, completion.index, message.timestamp)
            if output.refusal is not None:
                state.error = _build_refusal(output)
                stopped += self.finish(state.request_id, FinishReason.ERROR)
            else:
                completion.extend(output)
            if completion.is_finished:
                self._completions.pop(output.request_id, None)
                if output.finish_reason is None:
                    stopped.append(output.request_id)
                if state.is_finished:
                    state.timings.finished_time = message.timestamp
                    self._requests.pop(state.request_id, None)
            changed[state.request_id] = state
        return list(changed.values()), stopped

    def finish(self, request_id: str, reason: FinishReason) -> list[str]:
        """End a request here and now; unknown ones are ignored. Returns the core's ids to abort."""
        state = self._requests.pop(request_id, None)
        if state is None:
            return []
        running: list[str] = []
        for core_id, completion in zip(state.core_ids, state.completions, strict=True):
            if not completion.is_finished:
                running.append(core_id)
                self._completions.pop(core_id)
                completion.finish(reason, None)
        return running


class RequestState:
    """One request: its completions, and what belongs to the prompt.

    `error`, if set, is to be raised to the reader.
    """

    def __init__(self, prepared: PreparedRequest, tokenizer: Tokenizer | None) -> None:
        self.request_id = prepared.request_id
        self.core_ids = [child.request_id for child in prepared.children]
        self.sampling = prepared.sampling
        self.timings = RequestTimings(arrival_time=prepared.arrival_time)
        self.error: JengineError | None = None
        self._prompt = prepared.prompt
        self._prompt_token_ids = prepared.prompt_token_ids
        self._decode = tokenizer.id_to_token if tokenizer is not None else _no_text
        self._num_cached_tokens: int | None = None
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        if prepared.sampling.prompt_logprobs is not None:
            self._prompt_logprobs = [None]  # nothing predicts the first token
        self.completions = [
            CompletionState(index, prepared, tokenizer) for index in range(len(self.core_ids))
        ]

    @property
    def is_finished(self) -> bool:
        return all(completion.is_finished for completion in self.completions)

    def note_progress(self, output: CoreOutput, index: int, timestamp: float) -> None:
        """What a step says about the request as a whole."""
        timings = self.timings
        if index == 0:  # the others find the prompt in the prefix cache, where the first put it
            self._num_cached_tokens = max(self._num_cached_tokens or 0, output.num_cached_tokens)
        if timings.scheduled_time is None:
            timings.scheduled_time = output.scheduled_time
        if output.new_token_ids:
            timings.last_token_time = timestamp
            if timings.first_token_time is None:
                timings.first_token_time = output.first_token_time or timestamp
        timings.num_preemptions = max(timings.num_preemptions, output.num_preemptions)
        if output.prompt_logprobs and self._prompt_logprobs is not None:
            self._prompt_logprobs += [
                build_position_logprobs(data, self._decode) for data in output.prompt_logprobs
            ]

    def take(self) -> RequestOutput | None:
        """What is new since the last call, in the request's output kind; None if nothing is."""
        kind = self.sampling.output_kind
        is_finished = self.is_finished
        if kind is RequestOutputKind.FINAL_ONLY and not is_finished:
            return None
        fresh = [completion for completion in self.completions if completion.has_news]
        if not fresh:
            return None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=self._take_prompt_logprobs(kind, is_finished),
            outputs=[completion.take(kind) for completion in fresh],
            finished=is_finished,
            metrics=self.timings,
            num_cached_tokens=self._num_cached_tokens,
        )

    def _take_prompt_logprobs(
        self, kind: RequestOutputKind, is_finished: bool
    ) -> list[PositionLogprobs | None] | None:
        """In a DELTA stream once, when complete: a sibling's token may come before their last."""
        prompt_logprobs = self._prompt_logprobs
        if kind is not RequestOutputKind.DELTA or prompt_logprobs is None:
            return prompt_logprobs
        if len(prompt_logprobs) < len(self._prompt_token_ids) and not is_finished:
            return None
        self._prompt_logprobs = None
        return prompt_logprobs


class CompletionState:
    """One completion: its tokens, its text, and how much of both the reader has seen."""

    def __init__(self, index: int, prepared: PreparedRequest, tokenizer: Tokenizer | None) -> None:
        sampling = prepared.sampling
        self.index = index
        self.has_news = False
        self._sampling = sampling
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] | None = [] if sampling.wants_logprobs else None
        self._cumulative_logprob: float | None = 0.0 if sampling.wants_logprobs else None
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self._num_tokens_taken = 0
        self._num_chars_taken = 0
        self._text = ""
        self._decode = tokenizer.id_to_token if tokenizer is not None else _no_text
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None and sampling.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                prepared.prompt_token_ids,
                skip_special_tokens=sampling.skip_special_tokens,
                spaces_between_special_tokens=sampling.spaces_between_special_tokens,
            )
        self._stops: StopChecker | None = None
        if sampling.stop_strings:
            self._stops = StopChecker(
                sampling.stop_strings,
                include_stop_str_in_output=sampling.include_stop_str_in_output,
            )

    @property
    def is_finished(self) -> bool:
        return self._finish_reason is not None

    def extend(self, output: CoreOutput) -> None:
        """Append new tokens, at most up to the one that completes a stop string."""
        token_ids = output.new_token_ids
        # A token that stops is part of token_ids, but of the text only if the user asks for it.
        is_stop = output.finish_reason is FinishReason.STOP and not output.ends_in_text
        is_hidden = is_stop and not self._sampling.include_stop_str_in_output
        shown = token_ids[:-1] if is_hidden else token_ids
        if self._stops is None and self._logprobs is None:  # nobody looks at single tokens
            self._token_ids += token_ids
            if self._detokenizer is not None:
                self._text += self._detokenizer.add(shown)
        elif self._add_one_by_one(output, len(shown)):
            return
        self.has_news |= bool(token_ids)
        if output.finish_reason is not None:
            self.finish(output.finish_reason, output.error or output.stop_reason)

    def _add_one_by_one(self, output: CoreOutput, num_shown: int) -> bool:
        """Append tokens with their logprobs, and the text of the first ones. Returns whether a stop
        string is complete: what follows it is dropped."""
        for i, token_id in enumerate(output.new_token_ids):
            self._token_ids.append(token_id)
            if output.logprobs is not None and self._logprobs is not None:
                data = output.logprobs[i]
                self._logprobs.append(build_position_logprobs(data, self._decode))
                self._cumulative_logprob = (self._cumulative_logprob or 0.0) + data.logprobs[0]
            if self._detokenizer is None or i >= num_shown:
                continue
            if self._add_text(self._detokenizer.add([token_id])):
                return True
        return False

    def finish(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        """End the completion. What was held back becomes text, and may complete a stop string."""
        self.has_news = True
        if self._detokenizer is not None and self._add_text(self._detokenizer.finish()):
            return
        if self._stops is not None:
            self._text += self._stops.finish()
        self._finish_reason, self._stop_reason = reason, stop_reason

    def take(self, kind: RequestOutputKind) -> CompletionOutput:
        self.has_news = False
        if kind is RequestOutputKind.DELTA:
            text = self._text[self._num_chars_taken :]
            token_ids = self._token_ids[self._num_tokens_taken :]
            logprobs, self._logprobs = self._logprobs, None if self._logprobs is None else []
        else:
            text = self._text
            token_ids = self._token_ids.copy()
            logprobs = None if self._logprobs is None else self._logprobs.copy()
        self._num_chars_taken, self._num_tokens_taken = len(self._text), len(self._token_ids)
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=self._cumulative_logprob,
            logprobs=logprobs,
            finish_reason=None if self._finish_reason is None else self._finish_reason.value,
            stop_reason=self._stop_reason,
        )

    def _add_text(self, text: str) -> bool:
        """Append text, less what may begin a stop string. Returns whether one is complete."""
        if self._stops is None:
            self._text += text
            return False
        # A stop string counts if it ends after min_tokens; it may have begun before.
        self._text += self._stops.add(
            text, may_match=len(self._token_ids) > self._sampling.min_tokens
        )
        if self._stops.match is None:
            return False
        self._finish_reason, self._stop_reason = FinishReason.STOP, self._stops.match.stop
        self.has_news = True
        return True


def build_position_logprobs(
    data: LogprobsData, decode: Callable[[int], str | None]
) -> PositionLogprobs:
    """The chosen token first, then the best k or those named, among which it is not repeated."""
    chosen = data.token_ids[0]
    result: PositionLogprobs = {chosen: Logprob(data.logprobs[0], data.rank, decode(chosen))}
    ranks = range(1, len(data.token_ids)) if data.ranks is None else data.ranks
    for token_id, logprob, rank in zip(data.token_ids[1:], data.logprobs[1:], ranks, strict=True):
        if token_id != chosen:
            result[token_id] = Logprob(logprob, rank, decode(token_id))
    return result


def _build_refusal(output: CoreOutput) -> JengineError:
    message = output.error or "the engine refused the request"
    if output.refusal is Refusal.QUEUE_FULL:
        return QueueFullError(message)
    field, _, reason = message.partition(": ")  # as `InvalidRequestError` prints itself
    return InvalidRequestError(field, reason) if reason else InvalidRequestError("prompt", message)


def _no_text(token_id: int) -> None:
    """Decoder of an engine that has no tokenizer."""
