"""The engine's half of structured outputs: one `Constraint` for each request, and the threads that
work on them.

Nothing here takes time on the engine's thread. Taking in a token and computing the next mask is one
job of a thread; the scheduler leaves a request out until its job is done.
"""

import collections
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np

from jengine.request import FinishReason, Request
from jengine.structured_outputs import FIELD

if TYPE_CHECKING:
    import llguidance

    from jengine.grammar.vocabulary import Vocabulary

MAX_THREADS: Final = 8
NUM_COMPILED: Final = 32  # grammars kept, the last ones used; a large one takes tens of MB
# What a turn waits for a mask. Most take 0.1 ms, and a request that misses a step waits for the
# next; one that takes long delays its neighbours by so much at most, once for each of its tokens.
PATIENCE_SECONDS: Final = 1e-3

LoadVocabulary = Callable[[Iterable[int]], "Vocabulary"]  # given the ids that end a text


class Constraint:
    """How far one request has come in its grammar. Written by one job at a time, and read while
    `is_ready`: no job is under way.
    """

    def __init__(self, pool: "MatcherPool", request: Request) -> None:
        self.is_ready = False
        self.mask: np.ndarray | None = None  # i32[ceil(V / 32)]: bit i is set for an allowed token
        self.finish_reason: FinishReason | None = None  # set when no token can follow
        self.error: str | None = None  # with `FinishReason.ERROR`
        self._pool = pool
        self._request = request
        self._matcher: llguidance.LLMatcher | None = None
        self._never: np.ndarray | None = None  # mask of tokens that the request excludes by itself

    def advance(self, token_id: int, banned: Iterable[int]) -> None:
        """Take in the newest token. `banned`: what may not come next, whatever the grammar says."""
        banned = tuple(banned)
        self.is_ready = False
        self._pool.submit(self, lambda vocabulary: self._take(vocabulary, token_id, banned))

    def open(self, vocabulary: "Vocabulary", matcher: "llguidance.LLMatcher") -> None:
        """The job with which it begins."""
        self._matcher = matcher
        sampling = self._request.sampling
        never = []
        if sampling.allowed_token_ids is not None:
            never.append(~vocabulary.words_of(sampling.allowed_token_ids))
        if sampling.ignore_eos:
            never.append(vocabulary.words_of(self._request.eos_token_ids))
        if never:
            self._never = np.bitwise_or.reduce(never)
        self._look_ahead(vocabulary, tuple(self._request.banned_ids(0)))

    def fail(self, error: str) -> None:
        self.finish_reason, self.error = FinishReason.ERROR, error

    def _take(self, vocabulary: "Vocabulary", token_id: int, banned: tuple[int, ...]) -> None:
        assert self._matcher is not None
        if self._pool.consume(self._matcher, token_id):
            self._look_ahead(vocabulary, banned)
        else:
            self.fail(f"{FIELD}: {_error_of(self._matcher)}")

    def _look_ahead(self, vocabulary: "Vocabulary", banned: tuple[int, ...]) -> None:
        matcher = self._matcher
        assert matcher is not None
        mask = None
        if not matcher.is_stopped():
            started = time.perf_counter()
            mask = vocabulary.compute_mask(matcher)
            self._pool.count_mask(time.perf_counter() - started)
        if matcher.is_error():
            self.fail(f"{FIELD}: {_error_of(matcher)}")
        elif mask is None or matcher.is_stopped():
            self.finish_reason = FinishReason.STOP
        else:
            if self._never is not None:
                mask = mask & ~self._never
            if banned:
                mask = mask & ~vocabulary.words_of(banned)
            if mask.any():
                self.mask = mask
            elif matcher.is_accepting():
                self.finish_reason = FinishReason.STOP
            else:
                self.fail(f"{FIELD}: every token that the grammar allows is excluded")


class MatcherPool:
    """Compiles grammars and runs the jobs of constraints. The vocabulary is read and the threads
    are started with the first one.

    `notify` is called in a thread of the pool whenever a constraint has become ready.
    """

    def __init__(self, load_vocabulary: LoadVocabulary, notify: Callable[[], None]) -> None:
        self._load_vocabulary = load_vocabulary
        self._notify = notify
        self._num_threads = min(MAX_THREADS, max(2, os.cpu_count() or 2))
        self._threads: ThreadPoolExecutor | None = None
        self._vocabulary: Future[Vocabulary] | None = None
        self._executor: llguidance.LLExecutor | None = None
        self._compiled: collections.OrderedDict[str, Future[llguidance.LLMatcher]] = (
            collections.OrderedDict()
        )
        self._changed = threading.Condition()
        self._num_running = 0
        self._last_submit = 0.0
        self.num_compiled = 0
        self.num_masks = 0
        self.mask_seconds = 0.0

    @property
    def is_busy(self) -> bool:
        return self._num_running > 0

    def open(self, request: Request, grammar: str) -> Constraint:
        """A constraint at its start; it becomes ready when the grammar is compiled. Engine thread
        only."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="grammar")
            self._vocabulary = self._threads.submit(self._load, request.eos_token_ids)
        constraint = Constraint(self, request)
        compiled = self._compile(grammar)

        def begin(vocabulary: "Vocabulary") -> None:
            constraint.open(vocabulary, compiled.result().deep_copy())

        self.submit(constraint, begin)
        return constraint

    def submit(self, constraint: Constraint, job: "Callable[[Vocabulary], None]") -> None:
        """Run a job; then the constraint is ready."""
        assert self._threads is not None
        with self._changed:
            self._num_running += 1
            self._last_submit = time.monotonic()
        self._threads.submit(self._run, constraint, job)

    def wait_a_little(self) -> None:
        """Until no job is left, or none has been submitted for `PATIENCE_SECONDS`."""
        until = self._last_submit + PATIENCE_SECONDS
        with self._changed:
            while self._num_running and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def consume(self, matcher: "llguidance.LLMatcher", token_id: int) -> bool:
        """Without the interpreter lock: `LLMatcher.consume_token` keeps it, for 30 ms where a
        grammar is ambiguous."""
        assert self._executor is not None
        return self._executor.consume_token_par([(matcher, token_id)])[0]

    def count_mask(self, seconds: float) -> None:
        with self._changed:
            self.num_masks += 1
            self.mask_seconds += seconds

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _load(self, eos_ids: Iterable[int]) -> "Vocabulary":
        import llguidance  # an engine that is never asked for it does without

        self._executor = llguidance.LLExecutor(self._num_threads)
        return self._load_vocabulary(eos_ids)

    def _compile(self, grammar: str) -> "Future[llguidance.LLMatcher]":
        assert self._threads is not None and self._vocabulary is not None
        vocabulary = self._vocabulary
        if (compiled := self._compiled.get(grammar)) is None:
            self.num_compiled += 1
            compiled = self._threads.submit(lambda: vocabulary.result().build(grammar))
            self._compiled[grammar] = compiled
            if len(self._compiled) > NUM_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return compiled

    def _run(self, constraint: Constraint, job: "Callable[[Vocabulary], None]") -> None:
        assert self._vocabulary is not None
        try:
            job(self._vocabulary.result())
        except BaseException as error:  # of one request; a panic of the library is no `Exception`
            constraint.fail(f"{FIELD}: {error}")
        constraint.is_ready = True
        with self._changed:
            self._num_running -= 1
            self._changed.notify_all()
        self._notify()


def _error_of(matcher: "llguidance.LLMatcher") -> str:
    from jengine.grammar.vocabulary import short_message

    return short_message(matcher.get_error()) or "the grammar does not allow this token"
