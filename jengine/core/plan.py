"""The boundary between the scheduler and the device runtime: what goes into a step and what comes
out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from jengine.request import Request


class ScheduledRequest(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Tokens `[start, start + num_tokens)` of one request. `page_tables` are live lists, one per KV
    group: copy them. A struct, not a dataclass: 256 of them are made in each step, four times
    faster.

    A token whose id the host does not know yet (`start + i >= request.num_tokens`) is the last one
    sampled for `row`, and is read on the device. In a plan of several steps each of the tokens is
    such a one, but perhaps the first, and the next is sampled after each.
    """

    request: Request
    row: int
    start: int
    num_tokens: int
    page_tables: tuple[Sequence[int], ...]
    samples: bool  # the last token is the newest: a token is sampled after it
    is_admitted: bool  # first step since (re)admission: per-row device state must be set


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One dispatch. `scheduled` is never empty; `num_tokens` is the sum over it.

    With `num_steps` > 1 the device runs that many decode steps before the host hears of any: every
    request is a pure decode, has `num_steps` tokens here, and computes one of them in each step.
    """

    step_id: int
    scheduled: tuple[ScheduledRequest, ...]
    num_tokens: int
    num_steps: int = 1

    @property
    def tokens_per_step(self) -> int:
        return self.num_tokens // self.num_steps


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen token first, then the best k, falling, or the
    tokens that the request named."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # rank of the chosen token, 1 = most likely
    ranks: list[int] | None = None  # of those that were named


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought back, each list aligned with `StepPlan.scheduled`.

    `prompt_logprobs[i]` holds one entry for each prompt token at positions `start + 1 ...
    start + num_tokens` that is still inside the prompt, or None if the request did not ask.
    """

    token_ids: Sequence[list[int]]  # one for each step; ignored where `samples` is false
    logprobs: Sequence[TokenLogprobs | None] | None = None  # plans of one step only
    prompt_logprobs: Sequence[list[TokenLogprobs] | None] | None = None
    failed: frozenset[int] = frozenset()  # indices whose logits after `token_ids` were not finite


class RequestUpdate(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What `Scheduler.update` tells the front end about one request."""

    request: Request
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = (
        None  # chunk of prompt positions computed in this step
    )
