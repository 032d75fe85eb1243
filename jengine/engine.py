"""EngineCore: the loop that schedules, dispatches, collects and tells. The only file that sees
scheduler and runner.
"""

import collections
import dataclasses
import logging
import queue
import time
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from jengine.config import EngineConfig
from jengine.core.data_ranks import AnyScheduler, build_scheduler
from jengine.core.held import CompilingRequests
from jengine.core.kv_manager import KVManager
from jengine.core.plan import RequestUpdate, TokenLogprobs
from jengine.core.thinking import ThinkingBudget
from jengine.errors import InvalidRequestError, JengineError, QueueFullError, UnsupportedError
from jengine.grammar.matcher import MatcherPool
from jengine.models.loader import ModelDefinition
from jengine.protocol import (
    PROTOCOL_VERSION,
    AbortRequests,
    CallUtility,
    CoreDead,
    CoreOutput,
    CoreReady,
    CoreRequest,
    CoreRequests,
    EngineStats,
    FromCore,
    LogprobsData,
    Refusal,
    Shutdown,
    StepOutputs,
    ToCore,
    UtilityResult,
)
from jengine.request import FinishReason, Request
from jengine.runtime.data_ranks import AnySteps, RanksHandle, steps_of
from jengine.runtime.gang import Leader, join_world
from jengine.runtime.phases import Phases
from jengine.runtime.runner import ModelRunner, StepHandle
from jengine.runtime.start import start_runner

if TYPE_CHECKING:
    from jengine.grammar.vocabulary import Vocabulary

log = logging.getLogger(__name__)


class Wake:
    """A message of our own: a constraint has become ready."""


class EngineCore:
    """One model on one device or on a mesh, driven by messages; of several processes, the leader.
    `run` blocks its thread until `Shutdown`.

    Two steps are in flight at most: step n+1 is planned and dispatched while n runs, then n is
    collected.
    """

    def __init__(self, config: EngineConfig, emit: Callable[[FromCore], None]) -> None:
        self._config = config
        self._emit = emit
        self._inbox: queue.SimpleQueue[ToCore | Wake] = queue.SimpleQueue()
        self._in_flight: collections.deque[StepHandle | RanksHandle] = collections.deque()
        self._depth = 2 if config.scheduler.async_scheduling else 1
        self._stop_at: float | None = None  # deadline of a drain; 0 = now
        self._padded_tokens = 0  # of the last step's bucket
        self._close: Callable[[], None] = lambda: None  # of what there is so far
        self._model: ModelDefinition | None = None  # for its tokenizer
        self._leader: Leader | None = None  # of an engine over several processes
        self._matchers = MatcherPool(self._load_vocabulary, lambda: self._inbox.put(Wake()))
        self._compiling = CompilingRequests()
        self._is_stalled = False  # nothing can be done before a message comes
        self.runner: ModelRunner
        # One plan a step, or one for each data rank.
        self.scheduler: AnyScheduler
        self._steps: AnySteps

    def submit(self, message: ToCore) -> None:
        """Hand a message to the loop. Thread-safe."""
        self._inbox.put(message)

    def run(self) -> None:
        """Load, warm up, report `CoreReady`, then serve. Any failure is reported as `CoreDead`."""
        try:
            self.start()
            while not self._is_over():
                self.turn()
        except (
            Exception
        ) as error:  # the last line of defence: tell the front end instead of vanishing
            log.error("engine core stopped: %s", traceback.format_exc())
            known = isinstance(error, (JengineError, ValueError, OSError))
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            self._emit(CoreDead(reason))
            if self._leader is not None:
                self._leader.fail(reason)
        finally:
            self._matchers.close()
            self._close()
        if self._leader is not None:
            self._leader.close()

    @property
    def has_work(self) -> bool:
        """Whether a turn has something to do: a message, a request or a step in flight."""
        return bool(
            self._in_flight
            or self._compiling
            or self.scheduler.has_unfinished
            or not self._inbox.empty()
        )

    def stats(self) -> EngineStats:
        stats = msgspec.structs.asdict(self.scheduler.stats())
        stats["num_waiting"] += len(self._compiling)
        return EngineStats(
            **stats,
            num_compilations=self.runner.programs.num_late,
            padded_tokens=self._padded_tokens,
            num_compiling=self.runner.programs.num_pending,
            num_grammars=self._matchers.num_compiled,
            num_masks=self._matchers.num_masks,
            mask_seconds=self._matchers.mask_seconds,
        )

    def start(self) -> None:
        """Load the model, prepare executables, report `CoreReady`."""
        config, phases = self._config, Phases()
        cluster = None if config.gang is None else join_world(config.gang)
        started = start_runner(config, phases, self._own, cluster)
        self._leader = started.gang if isinstance(started.gang, Leader) else None
        self._model = started.model
        runner, model = started.runner, started.model
        self.attach(runner, f"{model.checkpoint.name}/{model.cfg.dtype}/{runner.groups}")
        self._emit(
            CoreReady(
                protocol_version=PROTOCOL_VERSION,
                num_pages=self.scheduler.stats().num_pages_total,
                page_size=self.runner.groups[0].page_size,
                max_model_len=self.runner.max_model_len,
                vocab_size=self.runner.vocab_size,
                memory_plan=self._memory_table(),
                dtype=model.cfg.dtype,
                compile_seconds=self.runner.programs.warm_up_seconds,
                startup_seconds=phases.total,
                phases=phases.seconds,
                num_compiled=self.runner.programs.num_compiled + started.num_drawn,
                num_compiling=self.runner.programs.num_pending,
                logits_processors=[p.info for p in self.runner.spec.logits_processors],
            )
        )

    def _own(self, close: Callable[[], None]) -> None:
        self._close = close

    def attach(self, runner: ModelRunner, fingerprint: str = "") -> None:
        """Take a runner, and build the scheduler over its pages. `fingerprint` tells cached pages
        of this model from another's."""
        pages = [
            KVManager(
                runner.groups,
                runner.num_pages,
                enable_prefix_caching=self._config.cache.enable_prefix_caching,
                fingerprint=fingerprint,
            )
            for _ in range(runner.num_data_ranks)
        ]
        kv = pages[0]
        max_chunk = self._config.scheduler.max_num_batched_tokens
        if kv.max_request_tokens(max_chunk) < runner.max_model_len - 1:
            raise ValueError(
                f"the KV cache holds {kv.max_request_tokens(max_chunk)} tokens of one request, "
                f"fewer than max_model_len={runner.max_model_len}: "
                "lower max_model_len or give it more memory"
            )
        config = dataclasses.replace(
            self._config.scheduler, max_decode_steps=runner.max_decode_steps
        )
        self.runner, self._steps = runner, steps_of(runner)
        self.scheduler = build_scheduler(config, pages, runner.max_model_len)

    def _memory_table(self) -> str:
        plan = self.runner.memory_plan()
        if plan.device.is_planned and plan.total > plan.device.budget:
            log.warning("more memory is needed than planned:\n%s", plan.table())
        names = [processor.info.name for processor in self.runner.spec.logits_processors]
        return plan.table() + (f"\nlogits processors: {', '.join(names)}" if names else "")

    def turn(self) -> None:
        """One turn of the loop: read messages, start a step if there is one, finish the oldest if
        it is its time.
        """
        self._read_inbox()
        if self._matchers.is_busy:
            self._matchers.wait_a_little()
        if self._compiling:
            self._admit_compiled()
        self._report(self.scheduler.settle())
        plan = self.scheduler.schedule() if len(self._in_flight) < self._depth else None
        if plan is not None:
            handle = self._steps.dispatch(plan)
            self._in_flight.append(handle)
            self._padded_tokens = handle.bucket.num_tokens * self.runner.num_data_ranks
        self._is_stalled = plan is None and not self._in_flight
        if self._in_flight and (plan is None or len(self._in_flight) == self._depth):
            handle = self._in_flight.popleft()
            self._report(self.scheduler.update(handle.plan, self._steps.collect(handle)))

    def _read_inbox(self) -> None:
        idle = self._is_stalled or not self.has_work
        if not self.has_work:
            self.scheduler.check_integrity()
        while True:
            try:
                message = self._inbox.get(timeout=self._wait_seconds() if idle else 0)
            except queue.Empty:
                return
            idle = False
            if not isinstance(message, Wake):
                self._handle(message)

    def _wait_seconds(self) -> float | None:
        return None if self._stop_at is None else 0.0

    def _handle(self, message: ToCore) -> None:
        match message:
            case CoreRequest():
                self._add(message)
            case CoreRequests(requests):
                for request in requests:
                    self._add(request)
            case AbortRequests(request_ids, reason):
                aborted = self.scheduler.abort(request_ids, reason)
                aborted += self._compiling.abort(request_ids, reason)
                self._report(
                    [RequestUpdate(r, [] if r.is_streamed else r.output_token_ids) for r in aborted]
                )
            case CallUtility(call_id, "wait_until_compiled", []):
                self._tell_when_compiled(message, call_id)
            case CallUtility(call_id, method, args):
                self._call(call_id, method, args)
            case Shutdown(drain_seconds):
                self._stop_at = time.monotonic() + drain_seconds

    def _add(self, message: CoreRequest) -> None:
        sampling = message.sampling
        request = Request(
            request_id=message.request_id,
            prompt_token_ids=message.prompt_token_ids,
            sampling=sampling,
            eos_token_ids=frozenset(message.eos_token_ids),
            priority=message.priority,
            cache_salt=message.cache_salt,
            arrival_time=message.arrival_time,
            seed=message.seed,
            # What comes with each position has no other way than step by step.
            is_streamed=message.is_streamed
            or sampling.wants_logprobs
            or sampling.prompt_logprobs is not None,
        )
        if sampling.thinking_markers is not None:  # has no grammar: the front end checked
            request.constrain(ThinkingBudget(request, self.runner.vocab_size))
        if not message.grammar:
            self._admit(request)
        elif len(self._compiling) >= self._config.scheduler.max_num_waiting:
            self._refuse(request, "too many requests are waiting", Refusal.QUEUE_FULL)
        else:
            request.constrain(self._matchers.open(request, message.grammar))
            self._compiling.add(request)

    def _admit_compiled(self) -> None:
        for request in self._compiling.take_ready():
            constraint = request.constraint
            if constraint is not None and constraint.finish_reason is not None:
                error = constraint.error or "structured_outputs: allows no token at all"
                self._refuse(request, error, Refusal.INVALID)
            else:
                self._admit(request)

    def _admit(self, request: Request) -> None:
        try:
            self.scheduler.add(request)
        except QueueFullError as error:
            self._refuse(request, str(error), Refusal.QUEUE_FULL)
        except InvalidRequestError as error:
            self._refuse(request, str(error), Refusal.INVALID)

    def _refuse(self, request: Request, error: str, refusal: Refusal) -> None:
        output = CoreOutput(request.request_id, [], FinishReason.ERROR)
        output.error, output.refusal = error, refusal
        self._tell([output])

    def _load_vocabulary(self, eos_ids: Iterable[int]) -> "Vocabulary":
        """Runs in a thread of the pool."""
        from jengine.grammar.vocabulary import Vocabulary

        if self._model is None:
            raise UnsupportedError("this engine has no tokenizer")
        tokenizer = self._model.checkpoint.load_tokenizer(self._config.model.tokenizer)
        return Vocabulary.of(tokenizer, eos_ids, self.runner.vocab_size)

    def _call(self, call_id: int, method: str, args: list[msgspec.Raw]) -> None:
        utilities: dict[str, Callable[[], object]] = {
            "reset_prefix_cache": self.scheduler.reset_prefix_cache,
            "stats": self.stats,
            "memory_plan": lambda: self.runner.memory_plan().table(),
            "check_integrity": self._check_integrity,
        }
        utility = utilities.get(method)
        if utility is None or args:
            self._emit(UtilityResult(call_id, error=f"no utility {method!r} of these arguments"))
            return
        self._emit(UtilityResult(call_id, msgspec.Raw(msgspec.msgpack.encode(utility()))))

    def _tell_when_compiled(self, message: CallUtility, call_id: int) -> None:
        """Answer now, or take the question up again when the last compilation has ended."""
        programs = self.runner.programs
        if programs.num_pending:
            programs.when_compiled(lambda: self.submit(message))
        elif failures := programs.failures:
            self._emit(UtilityResult(call_id, error=f"not compiled: {failures}"))
        else:
            num_ready = msgspec.msgpack.encode(len(programs.ready))
            self._emit(UtilityResult(call_id, msgspec.Raw(num_ready)))

    def _check_integrity(self) -> bool:
        self.scheduler.check_integrity()
        return True

    def _report(self, updates: list[RequestUpdate]) -> None:
        if updates:
            self._tell([self._output(update) for update in updates])

    def _tell(self, outputs: list[CoreOutput]) -> None:
        self._emit(StepOutputs(outputs, self.stats(), time.time()))

    def _output(self, update: RequestUpdate) -> CoreOutput:
        request = update.request
        num_new = len(update.new_token_ids)
        is_plain = update.logprobs is None and update.prompt_logprobs is None
        if is_plain and request.finish_reason is None and request.num_output_tokens > num_new:
            return CoreOutput(request.request_id, update.new_token_ids)  # three times faster
        return CoreOutput(
            request_id=request.request_id,
            new_token_ids=update.new_token_ids,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=_wire(update.logprobs),
            prompt_logprobs=_wire(update.prompt_logprobs),
            num_cached_tokens=max(request.num_cached_tokens, 0),
            num_preemptions=request.num_preemptions,
            scheduled_time=request.scheduled_time,
            first_token_time=request.first_token_time,
            ends_in_text=request.token_ids[-1] not in request.stop_ids,
            error=request.error or "the model's logits are not finite"
            if request.finish_reason is FinishReason.ERROR
            else None,
        )

    def _is_over(self) -> bool:
        if self._stop_at is None:
            return False
        drained = not self._in_flight and not self._compiling and not self.scheduler.has_unfinished
        return drained or time.monotonic() >= self._stop_at


def _wire(entries: list[TokenLogprobs] | None) -> list[LogprobsData] | None:
    if entries is None:
        return None
    return [LogprobsData(e.token_ids, e.logprobs, e.rank, e.ranks) for e in entries]
