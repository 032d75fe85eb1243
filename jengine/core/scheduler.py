"""Who gets how many tokens in the next step."""

import time
from bisect import insort
from collections.abc import Iterable

from msgspec.structs import replace

from jengine.config import SchedulerConfig
from jengine.core.held import HeldRequests
from jengine.core.kv_manager import KVManager, PageTables
from jengine.core.limits import (
    check_fits,
    check_queue,
    finish_reason,
    max_num_tokens,
    num_decodes_ahead,
)
from jengine.core.page_pool import IntegrityError
from jengine.core.plan import RequestUpdate, ScheduledRequest, StepPlan, StepResult
from jengine.core.prompt_logprobs import PromptLogprobs
from jengine.core.queue import build_queue, precedence
from jengine.core.stats import SchedulerStats
from jengine.errors import DuplicateRequestError
from jengine.request import FinishReason, Request, RequestStatus


class Scheduler:
    """Owner and only writer of requests, from `add` to their finish.

    There is no prefill phase and no decode phase. Each request has a number of computed tokens that
    must catch up with its tokens, known or pending; a step hands out a budget of tokens for that.
    Chunked prefill, prefix hits, preemption and planning ahead all follow from it:

    - a long prompt takes what is left of the budget, and goes on in the next step;
    - a prefix hit, or a preemption, only sets where the computed tokens start;
    - `schedule` counts its step as done, so it can be called again before `update` brings the
      step's tokens. Those are pending: the device feeds them to the next step itself. For the same
      reason one plan may hold several decode steps.

    `running` is in order of precedence (admission, or priority), and pages are taken back from its
    end only. So a request that is already in the plan is never preempted by the same plan.
    """

    def __init__(self, config: SchedulerConfig, kv: KVManager, max_model_len: int) -> None:
        if config.max_num_batched_tokens < config.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        self._config = config
        self._kv = kv
        self._max_model_len = max_model_len
        self._max_decode_steps = config.max_decode_steps or 1
        self._requests: dict[str, Request] = {}  # unfinished
        self._running: list[Request] = []
        self._waiting = build_queue(config.policy)
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._held = HeldRequests()
        self._prompt_logprobs = PromptLogprobs()
        self._next_step_id = 0
        self._next_update_id = 0
        self._stats = SchedulerStats(kv.page_size, kv.num_pages_total)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def is_idle(self) -> bool:
        """No request is left and no step is in flight."""
        return not self._requests and self._next_update_id == self._next_step_id

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def stats(self) -> SchedulerStats:
        """A snapshot."""
        return replace(
            self._stats,
            num_pages_used=self._kv.num_pages_used,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
        )

    def has(self, request_id: str) -> bool:
        """Whether a request of that id is in flight."""
        return request_id in self._requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises `DuplicateRequestError`, `InvalidRequestError` if it can never
        fit, `QueueFullError`; then the request is not taken."""
        if request.request_id in self._requests:
            raise DuplicateRequestError(f"request {request.request_id!r} is already in flight")
        request.max_num_tokens = max_num_tokens(request, self._max_model_len)
        max_kv_tokens = self._kv.max_request_tokens(self._config.max_num_batched_tokens)
        check_fits(request, self._max_model_len, max_kv_tokens)
        check_queue(request, self._config, len(self._waiting), self._stats.num_waiting_tokens)
        self._requests[request.request_id] = request
        self._waiting.push(request)
        self._stats.num_waiting_tokens += request.num_prompt_tokens

    def abort(
        self, request_ids: Iterable[str], reason: FinishReason = FinishReason.ABORT
    ) -> list[Request]:
        """Finish requests now, wherever they are; ids that are not in flight are ignored."""
        now = time.time()
        finished = []
        for request_id in request_ids:
            if (request := self._requests.get(request_id)) is not None:
                self._finish(request, reason, now)
                finished.append(request)
        self._drop_finished(bool(finished))
        return finished

    def schedule(self) -> StepPlan | None:
        """Plan what is dispatched next, or None if nothing can run before the next `update` or
        `add`.

        The caller dispatches the plan before it calls `schedule`, `update` or `abort` again.

        Running requests come first. New ones are admitted only if no running request still wants
        tokens or pages: then every running prompt has all its pages, and what is free is free.
        """
        scheduled: list[ScheduledRequest] = []
        num_steps = self._num_steps()
        if num_steps > 1:
            num_tokens = self._schedule_decodes(scheduled, num_steps)
        else:
            budget, all_served = self._schedule_running(scheduled)
            if all_served:
                budget = self._schedule_waiting(scheduled, budget)
            num_tokens = self._config.max_num_batched_tokens - budget
        if not scheduled:
            return None
        plan = StepPlan(self._next_step_id, tuple(scheduled), num_tokens, num_steps)
        self._next_step_id += 1
        self._stats.num_steps += num_steps
        self._stats.scheduled_tokens = plan.tokens_per_step
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestUpdate]:
        """Take in what a step brought: the oldest step first. Returns what is new to clients."""
        if plan.step_id != self._next_update_id:
            raise IntegrityError(f"step {plan.step_id} is not step {self._next_update_id}")
        self._next_update_id += 1
        now = time.time()
        updates = []
        any_finished = False
        for index, entry in enumerate(plan.scheduled):
            request = entry.request
            if request.is_finished:  # meanwhile; this step was planned before that was known
                continue
            update = self._update_request(index, entry, plan.num_steps, result, now)
            if update is not None:
                updates.append(update)
                any_finished |= request.is_finished
        self._drop_finished(any_finished)
        return updates

    def settle(self) -> list[RequestUpdate]:
        """Finish the constrained requests that no token can follow. Those of whom it is not known
        yet, nor what may follow, are left out of plans."""
        ended, now = self._held.take_ended(), time.time()
        for request, reason in ended:
            self._finish(request, reason, now)
        self._drop_finished(bool(ended))
        return [RequestUpdate(r, [] if r.is_streamed else r.output_token_ids) for r, _ in ended]

    def reset_prefix_cache(self) -> bool:
        """Forget cached pages. False, and nothing is done, while requests are running."""
        return self._kv.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless rows, pages and queues add up."""
        waiting = list(self._waiting)
        if {r.request_id for r in (*waiting, *self._running)} != self._requests.keys():
            raise IntegrityError("an unfinished request neither waits nor runs")
        if len(waiting) + len(self._running) != len(self._requests):
            raise IntegrityError("a request is in two places")
        rows = sorted([*self._free_rows, *(r.row for r in self._running)])
        if rows != list(range(self._config.max_num_seqs)):
            raise IntegrityError("a row is lost or shared")
        if any(r.status is not RequestStatus.RUNNING for r in self._running):
            raise IntegrityError("a request that does not run has a row")
        if self._stats.num_waiting_tokens != sum(r.num_prompt_tokens for r in waiting):
            raise IntegrityError("waiting prompt tokens are miscounted")
        self._kv.check_integrity({r.request_id for r in self._running})

    def _num_steps(self) -> int:
        """How many decode steps the device may run before the host sees what they sampled.

        More than one only while nobody waits who could be served: then no step in between would be
        another one. Nobody is preempted for it, and no request runs past its length.
        """
        limit = self._max_decode_steps
        if limit == 1 or (self._waiting and self._free_rows):
            return 1
        for request in self._running:
            num_wanted = self._num_wanted_tokens(request)
            if num_wanted > 1 or request.needs_host_tokens:
                return 1
            if num_wanted:
                limit = min(limit, num_decodes_ahead(request))
                if limit == 1:
                    return 1
        return limit if self._kv.has_room_ahead(len(self._running), limit) else 1

    def _schedule_decodes(self, scheduled: list[ScheduledRequest], num_steps: int) -> int:
        """`num_steps` tokens of every running request that wants one. Returns their number."""
        for request in self._running:
            if not self._num_wanted_tokens(request):
                continue
            tables = self._kv.allocate(request, num_steps, num_steps)
            if tables is None:
                raise IntegrityError("there is no room for the steps planned ahead")
            start = request.num_computed_tokens
            request.num_computed_tokens += num_steps
            request.num_pending_tokens += num_steps
            scheduled.append(
                ScheduledRequest(request, request.row, start, num_steps, tables, True, False)
            )
        return num_steps * len(scheduled)

    def _schedule_running(self, scheduled: list[ScheduledRequest]) -> tuple[int, bool]:
        """Returns the budget left, and whether every running request got all that it wanted."""
        budget = self._config.max_num_batched_tokens
        num_preemptions = self._stats.num_preemptions
        all_served = True
        running = self._running
        index = 0
        while index < len(running):
            request = running[index]
            wanted = self._num_wanted_tokens(request)
            # A prompt leaves one token for each request behind it, so that none of them stalls
            # while it is computed.
            num_tokens = min(wanted, budget - (len(running) - index - 1))
            if num_tokens < wanted:
                all_served = False
                num_tokens = self._kv.cut_chunk(request.num_computed_tokens, num_tokens)
            if num_tokens:
                tables = self._allocate_by_preempting(request, num_tokens)
                if tables is None:
                    break
                scheduled.append(self._commit(request, num_tokens, tables, is_admitted=False))
                budget -= num_tokens
            index += 1
        return budget, all_served and num_preemptions == self._stats.num_preemptions

    def _schedule_waiting(self, scheduled: list[ScheduledRequest], budget: int) -> int:
        """Admit from the head; nobody overtakes one that has to wait. Returns the budget left."""
        max_chunk = self._config.max_num_batched_tokens
        while self._waiting and self._free_rows and budget:
            request = self._waiting.peek()
            # Preempted while its last tokens were on the device, or before its mask was ready.
            if request.num_pending_tokens or request.is_held:
                break
            hit = self._kv.match_prefix(request)
            if not self._kv.admit(request, hit, max_chunk):
                break
            self._waiting.pop()
            self._start(request, hit.num_tokens)
            num_tokens = request.num_tokens - hit.num_tokens
            if num_tokens > budget:
                num_tokens = self._kv.cut_chunk(hit.num_tokens, budget)
            tables = self._kv.allocate(request, num_tokens)
            if tables is None:
                raise IntegrityError("an admitted request has no pages for its first chunk")
            scheduled.append(self._commit(request, num_tokens, tables, is_admitted=True))
            budget -= num_tokens
        return budget

    def _num_wanted_tokens(self, request: Request) -> int:
        """Tokens a running request can compute now."""
        num_pending = request.num_pending_tokens
        num_tokens = len(request.token_ids) + num_pending
        if request.is_held:
            return 0
        if num_pending and (num_tokens >= request.max_num_tokens or request.needs_host_tokens):
            return 0  # it ends, or goes on, with what is on the device: see `update`
        return num_tokens - request.num_computed_tokens

    def _allocate_by_preempting(self, request: Request, num_tokens: int) -> PageTables | None:
        """None if the request, being the last, had to give way itself."""
        while (tables := self._kv.allocate(request, num_tokens)) is None:
            victim = self._running.pop()
            self._preempt(victim)
            if victim is request:
                return None
        return tables

    def _preempt(self, request: Request) -> None:
        """Take pages and row back. What it has computed is computed again (from the prefix cache,
        as far as pages survive); what it has sampled stays, also what is still on the device."""
        self._kv.free(request)
        self._release_row(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._stats.num_preemptions += 1
        self._waiting.push_front(request)
        self._stats.num_waiting_tokens += request.num_prompt_tokens

    def _start(self, request: Request, num_cached_tokens: int) -> None:
        """Move a request from the queue into the running ones."""
        if request.scheduled_time is None:
            request.scheduled_time = time.time()
            request.num_cached_tokens = num_cached_tokens
            self._stats.num_prompt_tokens += request.num_prompt_tokens
            if request.sampling.reads_prefix_cache:
                self._stats.prefix_queries += request.num_tokens
                self._stats.prefix_hits += num_cached_tokens
        self._stats.num_waiting_tokens -= request.num_prompt_tokens
        request.num_computed_tokens = num_cached_tokens
        request.row = self._free_rows.pop()
        request.status = RequestStatus.RUNNING
        if self._config.policy == "priority":
            insort(self._running, request, key=precedence)
        else:
            self._running.append(request)

    def _commit(
        self, request: Request, num_tokens: int, tables: PageTables, *, is_admitted: bool
    ) -> ScheduledRequest:
        """Count the tokens as computed: their step is dispatched before another is planned."""
        start = request.num_computed_tokens
        end = request.num_computed_tokens = start + num_tokens
        samples = end == len(request.token_ids) + request.num_pending_tokens
        if samples:
            request.num_pending_tokens += 1
        return ScheduledRequest(
            request, request.row, start, num_tokens, tables, samples, is_admitted
        )

    def _update_request(
        self, index: int, entry: ScheduledRequest, num_steps: int, result: StepResult, now: float
    ) -> RequestUpdate | None:
        request = entry.request
        prompt_logprobs = logprobs = None
        if result.prompt_logprobs is not None:
            chunk = result.prompt_logprobs[index]
            prompt_logprobs = self._prompt_logprobs.unreported(entry, chunk)
        if not entry.samples:
            if prompt_logprobs is None:
                return None
            return RequestUpdate(request, [], prompt_logprobs=prompt_logprobs)
        request.num_pending_tokens -= num_steps
        token_ids = self._append(request, result.token_ids[index], now)
        if index in result.failed and not request.is_finished:
            self._stats.num_corrupted += 1
            self._finish(request, FinishReason.ERROR, now)
        if request.constraint is not None:
            self._held.hold(request)
        if not request.is_streamed:
            return RequestUpdate(request, request.output_token_ids) if request.is_finished else None
        if result.logprobs is not None and (position := result.logprobs[index]) is not None:
            logprobs = [position]
        return RequestUpdate(request, token_ids, logprobs, prompt_logprobs)

    def _append(self, request: Request, token_ids: list[int], now: float) -> list[int]:
        """Take in what was sampled, up to the token that ends the request. Returns what is new."""
        if token_ids and request.first_token_time is None:
            request.first_token_time = now
        for count, token_id in enumerate(token_ids, start=1):
            request.token_ids.append(token_id)
            if (reason := finish_reason(request, token_id)) is not None:
                self._finish(request, reason, now)
                token_ids = token_ids[:count]
                break
        self._stats.num_generation_tokens += len(token_ids)
        return token_ids

    def _finish(self, request: Request, reason: FinishReason, now: float) -> None:
        """End a request and give back its pages and row at once, even if steps in flight still
        contain it: whoever gets them next is in a later step, and the device executes steps in
        order. The caller drops it from `running`."""
        if reason is FinishReason.ERROR:
            self._kv.discard(request)
        else:
            self._kv.free(request)
        if request.status is RequestStatus.RUNNING:
            self._release_row(request)
        else:
            self._waiting.remove(request)
            self._stats.num_waiting_tokens -= request.num_prompt_tokens
        request.finish(reason, now)
        del self._requests[request.request_id]
        self._prompt_logprobs.forget(request.request_id)

    def _release_row(self, request: Request) -> None:
        self._free_rows.append(request.row)
        request.row = -1

    def _drop_finished(self, any_finished: bool) -> None:
        # In one pass: `list.remove` for each would be quadratic when a whole batch ends together.
        if any_finished:
            self._running = [r for r in self._running if not r.is_finished]
