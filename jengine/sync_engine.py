"""SyncEngine: the blocking counterpart of `AsyncEngine`, on which `LLM` stands.

The engine core runs in a daemon thread; whoever calls here waits on a queue. No event loop is
involved, so it works in a notebook, whose main thread already runs one. Not thread-safe.
"""

import atexit
import random
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import msgspec

from jengine.config import EngineConfig
from jengine.core_client import ENGINE_CORE, ThreadCoreClient
from jengine.core_process import Core
from jengine.errors import EngineDeadError, JengineError
from jengine.front_end import build_model_info, check_greeting
from jengine.input_processor import SEED_BITS, InputProcessor, PreparedRequest
from jengine.loading.checkpoint import open_checkpoint
from jengine.output_processor import OutputProcessor, RequestState
from jengine.outputs import RequestOutput
from jengine.protocol import (
    AbortRequests,
    CallUtility,
    CoreDead,
    CoreReady,
    CoreRequest,
    CoreRequests,
    EngineStats,
    FromCore,
    StepOutputs,
    UtilityResult,
)
from jengine.request import FinishReason
from jengine.text.tokenizer import Tokenizer

T = TypeVar("T")


class SyncEngine:
    """One engine core in a thread, and the requests given to it.

    Raises what `open_checkpoint` raises, and `EngineDeadError` if the core fails, now or later.
    """

    def __init__(self, config: EngineConfig, core_factory: str = ENGINE_CORE) -> None:
        checkpoint = open_checkpoint(config.model)
        tokenizer: Tokenizer | None = None
        if not config.model.skip_tokenizer_init:
            tokenizer = checkpoint.load_tokenizer(config.model.tokenizer)
        self.stats = EngineStats()
        self._greeting: CoreReady | None = None
        self._dead_error: str | None = None
        self._results: dict[int, UtilityResult] = {}
        self._num_calls = 0
        self._unsent: deque[PreparedRequest] = deque()
        self._num_in_core = 0  # completions sent and not finished
        self._max_in_core = config.scheduler.max_num_waiting
        self._finished: dict[str, RequestOutput | JengineError] = {}
        self._outputs = OutputProcessor(tokenizer)
        self._close_inputs: Callable[[], None] = lambda: None  # until there are any
        self._client = ThreadCoreClient(config, core_factory)
        # A program that forgets `close` must end cleanly all the same. Registered once the core has
        # imported jax, so that it runs before jax takes its back ends down; `finalize`'s own exit
        # hook may run after.
        self._stop = weakref.finalize(self, _stop_core, self._client)
        self._stop.atexit = False
        atexit.register(self._stop)
        try:
            self.ready = self._wait_for(lambda: self._greeting)
            check_greeting(self.ready)
        except BaseException:
            self.close()
            raise
        self.model_info = build_model_info(config, checkpoint, tokenizer, self.ready)
        # Seeds that requests do not bring come from the engine's, in order: a script gives the same
        # texts every time.
        draw_seed = random.Random(config.model.seed).getrandbits
        self.inputs = InputProcessor(
            config, self.model_info, tokenizer, lambda: draw_seed(SEED_BITS)
        )
        self._close_inputs = self.inputs.close

    @property
    def core(self) -> Core:
        """The live core."""
        return self._client.core

    def add(self, requests: Iterable[PreparedRequest]) -> None:
        """Start requests; more than the core's bounded queue takes follow as others finish, during
        `run`.
        """
        self._check_alive()
        self._unsent.extend(requests)
        self._send_more()

    def run(
        self, request_ids: Collection[str], on_finished: Callable[[RequestOutput], None]
    ) -> list[RequestOutput]:
        """Wait until these requests are finished; their outputs in order. If interrupted, they are
        aborted.
        """
        waiting = set(request_ids)
        try:
            while True:
                for request_id in waiting & self._finished.keys():
                    waiting.discard(request_id)
                    result = self._finished[request_id]
                    if isinstance(result, JengineError):
                        raise result
                    on_finished(result)
                if not waiting:
                    break
                self._receive()
            return [
                result
                for i in request_ids
                if isinstance(result := self._finished[i], RequestOutput)
            ]
        finally:
            self._forget(request_ids)

    def call(self, method: str, *args: Any) -> Any:
        """Run a rare operation of the core and return its result."""
        self._check_alive()
        self._num_calls += 1
        call_id = self._num_calls
        self._client.send(
            CallUtility(call_id, method, [msgspec.Raw(msgspec.msgpack.encode(arg)) for arg in args])
        )
        result = self._wait_for(lambda: self._results.pop(call_id, None))
        if result.error is not None:
            raise JengineError(f"{method}: {result.error}")
        return msgspec.msgpack.decode(result.value)

    def close(self) -> None:
        """Stop the core and free the device. Idempotent; also done when the object or the program
        ends.
        """
        self._dead_error = self._dead_error or "the engine was closed"
        self._close_inputs()
        self._stop()
        atexit.unregister(self._stop)

    def _forget(self, request_ids: Collection[str]) -> None:
        """Drop every trace of requests; those that still run are aborted."""
        gone = set(request_ids)
        self._unsent = deque(request for request in self._unsent if request.request_id not in gone)
        for request_id in request_ids:
            self._finished.pop(request_id, None)
            if running := self._outputs.finish(request_id, FinishReason.ABORT):
                self._num_in_core -= len(running)
                self._client.send(AbortRequests(running))

    def _send_more(self) -> None:
        together: list[CoreRequest] = []
        while self._unsent:
            num_children = len(self._unsent[0].children)
            if self._num_in_core and self._num_in_core + num_children > self._max_in_core:
                break
            prepared = self._unsent.popleft()
            self._outputs.add(prepared)
            self._num_in_core += num_children
            for child in prepared.children:
                # Nobody reads before the end, and per-step messages would cost the core's thread
                # the interpreter lock. Only a stop string is looked for in every token.
                child.is_streamed = bool(child.sampling.stop_strings)
                together.append(child)
        if together:
            self._client.send(CoreRequests(together))

    def _wait_for(self, get: Callable[[], T | None]) -> T:
        while (value := get()) is None:
            self._receive()
        return value

    def _receive(self) -> None:
        """Block until the core says something, and take it in."""
        self._check_alive()
        for message in self._client.receive(timeout=None):
            self._on_message(message)
        self._send_more()

    def _check_alive(self) -> None:
        if self._dead_error is not None:
            raise EngineDeadError(self._dead_error)

    def _on_message(self, message: FromCore) -> None:
        match message:
            case StepOutputs():
                self.stats = message.stats
                changed, stopped = self._outputs.process(message)
                if stopped:
                    self._client.send(AbortRequests(stopped, FinishReason.STOP))
                for state in changed:
                    self._on_change(state)
            case UtilityResult():
                self._results[message.call_id] = message
            case CoreReady():
                self._greeting = message
            case CoreDead():
                self._dead_error = self._dead_error or message.error

    def _on_change(self, state: RequestState) -> None:
        if not state.is_finished:
            return
        self._num_in_core -= len(state.core_ids)
        output = state.error or state.take()
        assert output is not None
        self._finished[state.request_id] = output


def _stop_core(client: ThreadCoreClient) -> None:
    client.stop()
    client.join()
