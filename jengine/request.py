"""What a client asks for, and a request through its life on the host."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from jengine.errors import InvalidRequestError
from jengine.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

MAX_N = 128
MAX_PATTERN_SIZE = 512  # tokens; each size costs a look at every new token
MIN_TEMPERATURE = 0.01  # of those that are not greedy
MAX_LOGPROB_TOKEN_IDS = 128
MAX_BANNED_IDS = 128  # stop ids held back by min_tokens plus last tokens of bad words, per request
SAMPLING_EPS = 1e-5
FLOAT32_MAX, FLOAT32_TINY = 3.4e38, 1.2e-38  # what the device's numbers hold, rounded inwards


class RequestOutputKind(StrEnum):
    """What each `RequestOutput` of a stream carries (vLLM)."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


class RepetitionDetectionParams(msgspec.Struct, kw_only=True):
    """Ends a completion that goes round in circles: its last tokens are `min_count` times the same
    sequence of `min_pattern_size` to `max_pattern_size` tokens (vLLM). 0 as the largest is off, as
    the smallest 1.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        name = "repetition_detection"
        if not 0 <= self.min_pattern_size <= self.max_pattern_size <= MAX_PATTERN_SIZE:
            raise InvalidRequestError(
                name,
                f"needs 0 <= min_pattern_size <= max_pattern_size <= {MAX_PATTERN_SIZE}, "
                f"got {self.min_pattern_size} and {self.max_pattern_size}",
            )
        if self.max_pattern_size and self.min_count < 2:
            raise InvalidRequestError(name, f"min_count must be at least 2, got {self.min_count}")

    def is_met(self, token_ids: Sequence[int], num_outputs: int) -> bool:
        """Whether the last `num_outputs` tokens end in such a repetition."""
        for size in range(max(self.min_pattern_size, 1), self.max_pattern_size + 1):
            span = size * (self.min_count - 1)
            if span + size > num_outputs:
                return False
            # Each token of the last copies equals the one a pattern before it.
            if all(token_ids[-i] == token_ids[-i - size] for i in range(1, span + 1)):
                return True
        return False


class SamplingParams(msgspec.Struct, kw_only=True):
    """How tokens are chosen, with vLLM's names, defaults and bounds (`SamplingParams` of vLLM
    0.22).

    `temperature` below 1e-5 is greedy, else raised to 0.01 at least. `top_k` 0 or -1 keeps all.
    `logprobs` / `prompt_logprobs`: None off, k >= 0 the best k (and always the chosen token), -1
    the whole vocabulary. `logprob_token_ids` asks for those of these tokens instead of the best
    ones; `logprobs`, if given too, must be their number. `seed` None draws a random seed.
    `max_tokens` None means up to the model's length.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    skip_reading_prefix_cache: bool | None = None
    structured_outputs: StructuredOutputsParams | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    extra_args: dict[str, Any] | None = None  # for logits processors
    thinking_token_budget: int | None = None  # -1: no bound
    bad_word_ids: list[list[int]] | None = None  # filled by the front end from `bad_words`
    thinking_markers: list[list[int]] | None = None  # start and end; filled by the front end, too

    def __post_init__(self) -> None:
        if self.seed == -1:
            self.seed = None
        if self.top_k == -1:
            self.top_k = 0
        if self.thinking_token_budget == -1:
            self.thinking_token_budget = None
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if 0.0 < self.temperature < SAMPLING_EPS:
            self.temperature = 0.0
        elif 0.0 < self.temperature < MIN_TEMPERATURE:
            log.warning("temperature %g is raised to %g", self.temperature, MIN_TEMPERATURE)
            self.temperature = MIN_TEMPERATURE
        self._check()

    def _check(self) -> None:
        def need(ok: bool, name: str, message: str) -> None:
            if not ok:
                raise InvalidRequestError(name, message)

        need(1 <= self.n <= MAX_N, "n", f"must be between 1 and {MAX_N}, got {self.n}")
        need(
            self.n == 1 or not self.is_greedy,
            "n",
            f"must be 1 with greedy sampling (temperature 0), got {self.n}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            need(-2.0 <= value <= 2.0, name, f"must be in [-2, 2], got {value}")
        need(
            FLOAT32_TINY <= self.repetition_penalty <= FLOAT32_MAX,
            "repetition_penalty",
            f"must be > 0 and at most {FLOAT32_MAX}, got {self.repetition_penalty}",
        )
        need(
            0.0 <= self.temperature <= FLOAT32_MAX,
            "temperature",
            f"must be >= 0 and at most {FLOAT32_MAX}, got {self.temperature}",
        )
        need(0.0 < self.top_p <= 1.0, "top_p", f"must be in (0, 1], got {self.top_p}")
        need(
            0 <= self.top_k < 2**31,
            "top_k",
            f"must be -1, 0 or a positive number, got {self.top_k}",
        )
        need(0.0 <= self.min_p <= 1.0, "min_p", f"must be in [0, 1], got {self.min_p}")
        need(
            self.seed is None or -(2**63) <= self.seed < 2**63,
            "seed",
            "must fit in a signed 64-bit integer",
        )
        need(
            self.max_tokens is None or self.max_tokens >= 1,
            "max_tokens",
            f"must be at least 1, got {self.max_tokens}",
        )
        need(self.min_tokens >= 0, "min_tokens", f"must be at least 0, got {self.min_tokens}")
        need(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}",
        )
        self._check_logprobs(need)
        need(
            self.truncate_prompt_tokens is None or self.truncate_prompt_tokens >= -1,
            "truncate_prompt_tokens",
            "must be -1 (the model's length) or >= 1",
        )
        need(
            self.truncate_prompt_tokens != 0,
            "truncate_prompt_tokens",
            "must be -1 (the model's length) or >= 1",
        )
        budget = self.thinking_token_budget
        need(budget is None or budget >= 0, "thinking_token_budget", f"must be >= -1, got {budget}")
        need(all(self.stop_strings), "stop", "must not hold an empty string")
        need(not self.stop or self.detokenize, "stop", "needs detokenize=True")
        need(all(self.bad_words or ()), "bad_words", "must not hold an empty string")
        need(self.allowed_token_ids != [], "allowed_token_ids", "must not be empty")
        for bias in (self.logit_bias or {}).values():
            need(abs(bias) <= FLOAT32_MAX, "logit_bias", f"must be finite, got {bias}")

    def _check_logprobs(self, need: Callable[[bool, str, str], None]) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            need(
                value is None or value >= -1,
                name,
                f"must be -1 (whole vocabulary) or >= 0, got {value}",
            )
        num_named = len(self.logprob_token_ids or ())
        need(
            num_named <= MAX_LOGPROB_TOKEN_IDS,
            "logprob_token_ids",
            f"must be at most {MAX_LOGPROB_TOKEN_IDS} ids, got {num_named}",
        )
        need(
            self.logprob_token_ids is None or self.logprobs in (None, num_named),
            "logprob_token_ids",
            f"logprobs must be left out or be their number, {num_named}, got {self.logprobs}",
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < SAMPLING_EPS

    @property
    def stop_strings(self) -> list[str]:
        stop = self.stop
        return [stop] if isinstance(stop, str) else list(stop or ())

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None or bool(self.logprob_token_ids)

    @property
    def reads_prefix_cache(self) -> bool:
        """Prompt logprobs need every prompt position computed, so they skip cached pages by
        default.
        """
        if self.skip_reading_prefix_cache is not None:
            return not self.skip_reading_prefix_cache
        return self.prompt_logprobs is None

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def needs_host_tokens(self) -> bool:
        """Whether planning the next token needs the previous one on the host (then no step is
        planned ahead).
        """
        return bool(self.bad_word_ids)

    def check_vocab(self, vocab_size: int) -> None:
        """Raise `InvalidRequestError` if a field names a token id outside `[0, vocab_size)`."""
        fields: dict[str, Sequence[int]] = {
            "stop_token_ids": self.stop_token_ids or (),
            "allowed_token_ids": self.allowed_token_ids or (),
            "logprob_token_ids": self.logprob_token_ids or (),
            "logit_bias": tuple(self.logit_bias or ()),
        }
        for name, ids in fields.items():
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise InvalidRequestError(
                        name, f"token id {token_id} is outside the vocabulary [0, {vocab_size})"
                    )

    def clone(self, **changes: Any) -> "SamplingParams":
        return msgspec.structs.replace(self, **changes)


class TokenConstraint(Protocol):
    """Which tokens may come next in one request (`jengine.grammar.matcher.Constraint`).

    While it `is_ready`, either `mask` says it, or `finish_reason` that none may.
    """

    is_ready: bool
    mask: "np.ndarray | None"  # i32[ceil(V / 32)]: bit i is set for an allowed token
    finish_reason: "FinishReason | None"
    error: str | None

    def advance(self, token_id: int, banned: Iterable[int]) -> None:
        """Take in the newest token; ready again some time later. `banned`: what may not come next
        for other reasons."""
        ...


class RequestStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence of tokens being completed. Owned and written by `Scheduler`; others read.

    `num_computed_tokens` counts tokens whose forward pass has been dispatched. `num_pending_tokens`
    counts sampled tokens that are still on the device: they follow `token_ids` but their ids are
    not known here yet. The scheduler only ever makes `num_computed_tokens` catch up with
    `num_tokens + num_pending_tokens`.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    cache_salt: str = ""
    arrival_time: float = field(default_factory=time.time)

    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(default_factory=list)  # prompt + output, known on the host
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_cached_tokens: int = (
        -1
    )  # prompt tokens served by the prefix cache at first admission; -1 before
    num_preemptions: int = 0
    row: int = -1  # row of the device's per-request state while RUNNING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # with `FinishReason.ERROR`
    constraint: TokenConstraint | None = None
    is_held: bool = False  # until it is known what it may sample
    scheduled_time: float | None = None  # first admission
    first_token_time: float | None = None
    finish_time: float | None = None
    seed: int = 0  # effective seed, 64 bits; never None
    is_streamed: bool = True  # else the front end hears of it once, at its end
    max_num_tokens: int = 0  # prompt and output tokens at which it ends; set on `Scheduler.add`
    # Derived from the above once, as they are looked at in every step:
    stop_ids: frozenset[int] = field(init=False)  # token ids that end it
    needs_host_tokens: bool = field(init=False)

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.prompt_token_ids)
        eos = frozenset[int]() if self.sampling.ignore_eos else self.eos_token_ids
        self.stop_ids = eos.union(self.sampling.stop_token_ids or ())
        self.needs_host_tokens = self.sampling.needs_host_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    def constrain(self, constraint: TokenConstraint) -> None:
        self.constraint = constraint
        self.needs_host_tokens = True

    def banned_ids(self, num_outputs: int) -> list[int]:
        """Tokens that must not be sampled after so many output tokens: stops before `min_tokens`,
        and ends of bad words."""
        p = self.sampling
        banned: list[int] = []
        if num_outputs < p.min_tokens:
            banned += self.eos_token_ids
            banned += p.stop_token_ids or ()
        # A request with bad words is never planned ahead (`needs_host_tokens`), so all its tokens
        # are known here.
        for word in p.bad_word_ids or ():
            prefix = word[:-1]
            outputs = self.token_ids[self.num_prompt_tokens :]
            if len(outputs) >= len(prefix) and (not prefix or outputs[-len(prefix) :] == prefix):
                banned.append(word[-1])
        return banned

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_token_ids) :]

    def finish(self, reason: FinishReason, now: float) -> None:
        self.status, self.finish_reason, self.finish_time = RequestStatus.FINISHED, reason, now

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED
