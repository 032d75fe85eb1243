"""Every request of every protocol passes `tracked`: it runs it, measures it, logs it, and lets go
of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from jengine.beam_search import BeamSearchParams, search_beams
from jengine.errors import InvalidRequestError, JengineError
from jengine.input_processor import TokensPrompt
from jengine.outputs import RequestOutput
from jengine.request import RequestOutputKind, SamplingParams
from jengine.server.metrics import ServerMetrics
from jengine.server.request_limits import check_sizes
from jengine.server.state import ServerState
from jengine.structured_outputs import FIELD

logger = logging.getLogger("jengine.requests")


@dataclass(frozen=True, slots=True)
class Submission:
    """What `AsyncEngine.generate` is called with, and which endpoint calls."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    endpoint: str
    prompt: str | None = None
    priority: int = 0
    cache_salt: str = ""
    deadline: float | None = None
    constraint_field: str = ""  # what this protocol calls the constraint, if not as we do
    beams: BeamSearchParams | None = None  # a search; `sampling` says its `n` and `max_tokens`


async def tracked(
    state: ServerState, submission: Submission
) -> AsyncGenerator[RequestOutput, None]:
    """The outputs of one request. Closing the iterator aborts it: its pages are free within one
    step.
    """
    engine = state.serving_engine()
    prompt = TokensPrompt(prompt_token_ids=submission.prompt_token_ids)
    if submission.prompt is not None:
        prompt["prompt"] = submission.prompt
    record, request_id = RequestRecord(submission), submission.request_id
    state.num_active += 1
    state.last_receive_time = time.time()
    try:
        check_sizes(submission.sampling, submission.cache_salt, engine.model_info.vocab_size)
        options: dict[str, Any] = {
            "priority": submission.priority,
            "cache_salt": submission.cache_salt,
            "deadline": submission.deadline,
        }
        if submission.beams is None:
            outputs = engine.generate(prompt, submission.sampling, request_id, **options)
        else:
            outputs = search_beams(
                engine,
                submission.prompt_token_ids,
                submission.beams,
                request_id,
                prompt=submission.prompt,
                skip_special_tokens=submission.sampling.skip_special_tokens,
                **options,
            )
        # aclosing: leaving an `async for` does not close the generator behind it, and only closing
        # aborts.
        async with aclosing(outputs):
            async for output in outputs:
                record.add(output, state.metrics)
                if not output.finished:
                    state.unread[id(record)] = time.monotonic(), request_id, submission.endpoint
                yield output
                state.unread.pop(id(record), None)
    except InvalidRequestError as error:
        record.error = type(error).__name__
        if submission.constraint_field and error.field.startswith(FIELD):
            raise InvalidRequestError(submission.constraint_field, error.message) from None
        raise
    except (JengineError, TimeoutError) as error:
        record.error = type(error).__name__
        raise
    finally:
        state.num_active -= 1
        state.unread.pop(id(record), None)
        record.close(state.metrics, log=state.settings.log_requests)


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request so far."""

    submission: Submission
    started_at: float = field(default_factory=time.time)
    last_output_at: dict[int, float] = field(default_factory=dict)
    num_tokens: dict[int, int] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    last: RequestOutput | None = None
    error: str | None = None

    def add(self, output: RequestOutput, metrics: ServerMetrics) -> None:
        is_stream = self.submission.sampling.output_kind is RequestOutputKind.DELTA
        now = time.time()
        self.last = output
        for completion in output.outputs:
            index, count = completion.index, len(completion.token_ids)
            self.num_tokens[index] = self.num_tokens.get(index, 0) + count
            if is_stream and count:
                if (before := self.last_output_at.get(index)) is not None:
                    metrics.inter_token_latency.observe((now - before) / count)
                self.last_output_at[index] = now
            if completion.finish_reason is not None and index not in self.finish_reasons:
                self.finish_reasons[index] = completion.finish_reason
                self._observe_completion(index, output, metrics, now)

    def close(self, metrics: ServerMetrics, *, log: bool) -> None:
        submission = self.submission
        if self.error is not None:
            metrics.reject(self.error)
        elif len(self.finish_reasons) < submission.sampling.n:
            metrics.cancel(submission.endpoint)
        metrics.params_n.observe(submission.sampling.n)
        if submission.sampling.max_tokens is not None:
            metrics.params_max_tokens.observe(submission.sampling.max_tokens)
        if self.num_tokens:
            metrics.max_generation_tokens.observe(max(self.num_tokens.values()))
        if log:
            self._log()

    def _observe_completion(
        self, index: int, output: RequestOutput, metrics: ServerMetrics, now: float
    ) -> None:
        metrics.finished(self.finish_reasons[index])
        num_prompt, num_output = len(output.prompt_token_ids), self.num_tokens[index]
        metrics.prompt_tokens.observe(num_prompt)
        metrics.generation_tokens.observe(num_output)
        metrics.prefill_computed_tokens.observe(num_prompt - (output.num_cached_tokens or 0))
        timings = output.metrics
        if timings is None:
            return
        end = timings.last_token_time or now
        metrics.e2e_latency.observe(end - timings.arrival_time)
        if timings.scheduled_time is not None:
            metrics.queue_time.observe(timings.scheduled_time - timings.arrival_time)
            metrics.inference_time.observe(end - timings.scheduled_time)
        if timings.first_token_time is not None:
            metrics.time_to_first_token.observe(timings.first_token_time - timings.arrival_time)
            metrics.decode_time.observe(end - timings.first_token_time)
            if timings.scheduled_time is not None:
                metrics.prefill_time.observe(timings.first_token_time - timings.scheduled_time)
            if num_output > 1:
                per_token = (end - timings.first_token_time) / (num_output - 1)
                metrics.time_per_output_token.observe(per_token)

    def _log(self) -> None:
        """One line for each request; never its text."""
        submission, last = self.submission, self.last
        timings = last.metrics if last else None
        reasons = sorted(set(self.finish_reasons.values()))
        ttft = timings.time_to_first_token if timings else None
        queue = timings.queue_time if timings else None
        fields = {
            "request_id": submission.request_id,
            "endpoint": submission.endpoint,
            "prompt_tokens": len(submission.prompt_token_ids),
            "cached_tokens": (last.num_cached_tokens or 0) if last else 0,
            "output_tokens": sum(self.num_tokens.values()),
            "finish_reason": self.error or "+".join(reasons) or "cancelled",
            "queue_ms": _milliseconds(queue),
            "ttft_ms": _milliseconds(ttft),
            "e2e_ms": _milliseconds(time.time() - self.started_at),
        }
        logger.info("request finished", extra={"fields": fields})


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)
