"""AsyncEngine: the engine's asyncio face, on which the servers stand. It owns the open streams.

Everything here runs on one event loop. The core's messages come in batches to `_on_messages`, which
updates each request's state and wakes its reader; the reader builds its output when it runs
(`RequestState.take`).
"""

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import msgspec

from jengine.config import EngineConfig
from jengine.core_client import ENGINE_CORE, CoreClient, ProcessCoreClient, ThreadCoreClient
from jengine.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineDrainingError,
    JengineError,
    QueueFullError,
)
from jengine.front_end import build_model_info, check_greeting
from jengine.input_processor import (
    SEED_BITS,
    InputProcessor,
    PreparedRequest,
    Prompt,
    has_constraint,
    is_short,
)
from jengine.loading.checkpoint import open_checkpoint
from jengine.model_info import ModelInfo
from jengine.output_processor import OutputProcessor
from jengine.outputs import RequestOutput
from jengine.protocol import (
    AbortRequests,
    CallUtility,
    CoreDead,
    CoreReady,
    EngineStats,
    FromCore,
    StepOutputs,
    UtilityResult,
)
from jengine.request import FinishReason, SamplingParams
from jengine.request_stream import RequestStream
from jengine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")
NUM_TEXT_THREADS = 2
NUM_GRAMMAR_THREADS = 2  # grammars are checked one at a time, and what is waited for is a process
MAX_PREPARING = 1024  # requests that wait for these threads


class AsyncEngine:
    """Streams of `RequestOutput` over one engine core.

    `await AsyncEngine.create(config)` makes one. Not thread-safe: use it on the loop that did.
    """

    model_info: ModelInfo
    ready: CoreReady  # the core's greeting: pages, memory plan, start-up seconds
    stats: EngineStats  # as of the last step
    _inputs: InputProcessor
    _outputs: OutputProcessor

    def __init__(self, client: CoreClient) -> None:
        self.stats = EngineStats()
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._greeting: asyncio.Future[CoreReady] = self._loop.create_future()
        self._streams: dict[str, RequestStream] = {}
        self._starting: set[str] = set()  # ids being tokenised
        self._calls: dict[int, asyncio.Future[UtilityResult]] = {}
        self._num_calls = 0
        self._dead_error: str | None = None
        self._is_draining = False
        self._is_closed = False
        self._close_inputs: Callable[[], None] = lambda: None  # until there are any
        self._idle = asyncio.Event()
        self._idle.set()
        self._text_pool = ThreadPoolExecutor(NUM_TEXT_THREADS, thread_name_prefix="text")
        # Of its own: a grammar that takes its seconds must not hold up somebody's long prompt.
        self._grammar_pool = ThreadPoolExecutor(NUM_GRAMMAR_THREADS, thread_name_prefix="grammars")
        client.attach(self._loop, self._on_messages)

    @classmethod
    async def create(
        cls, config: EngineConfig, *, in_process: bool = False, core_factory: str = ENGINE_CORE
    ) -> Self:
        """Start an engine core and return when it can serve.

        The core is a child process, or with `in_process` a thread of this one (notebooks).
        `core_factory` ("module:name") replaces the core in tests. Raises what `open_checkpoint`
        raises, or `EngineDeadError`.
        """
        loop = asyncio.get_running_loop()
        # Before the core does so, too: a model is fetched once, and errors keep their types.
        checkpoint = await loop.run_in_executor(None, open_checkpoint, config.model)
        client_type = ThreadCoreClient if in_process else ProcessCoreClient
        engine = cls(client_type(config, core_factory))
        try:
            tokenizer = None
            if not config.model.skip_tokenizer_init:
                tokenizer = await engine._in_text_pool(
                    checkpoint.load_tokenizer, config.model.tokenizer
                )
            engine.ready = ready = await engine._greeting
            check_greeting(ready)
            engine.model_info = info = build_model_info(config, checkpoint, tokenizer, ready)
            draw_seed = functools.partial(secrets.randbits, SEED_BITS)
            engine._inputs = InputProcessor(config, info, tokenizer, draw_seed)
            engine._close_inputs = engine._inputs.close
            engine._outputs = OutputProcessor(tokenizer)
        except BaseException:
            await engine.shutdown()
            raise
        return engine

    # --- requests

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt. Closing or cancelling the generator aborts the request.

        `prompt` is text, token ids, or a dict `{"prompt": ...}` / `{"prompt_token_ids": [...]}`.
        Each output holds what `sampling_params.output_kind` says, for one or more of the `n`
        completions (see their `index`); a reader that is slower than the engine gets fewer and
        larger outputs. `priority`: lower runs first. Requests with different `cache_salt` never
        share prefix-cache pages. `deadline` is a `time.monotonic()` value.

        Raises `InvalidRequestError`, `DuplicateRequestError`, `QueueFullError`,
        `EngineDrainingError`, `EngineDeadError`, and `TimeoutError` when the deadline passes. The
        first ones come with the first output.
        """
        self._check_accepts()
        if request_id in self._starting or request_id in self._streams:
            raise DuplicateRequestError(f"request_id {request_id!r} is in flight")
        prepare = functools.partial(
            self._inputs.prepare,
            prompt,
            sampling_params,
            request_id,
            priority=priority,
            cache_salt=cache_salt,
        )
        is_constrained = has_constraint(sampling_params)
        if not is_constrained and is_short(prompt):
            prepared = prepare()
        else:
            pool = self._grammar_pool if is_constrained else self._text_pool
            prepared = await self._prepare_in_pool(pool, request_id, prepare)
        stream = self._start(prepared, deadline)
        try:
            while True:
                output = await stream.next()
                yield output
                if output.finished:
                    return
        finally:
            self._close(stream)

    async def abort(self, request_id: str) -> None:
        """End a request: its stream finishes with reason "abort". Unknown ids are ignored."""
        self._finish(request_id, FinishReason.ABORT)

    async def _prepare_in_pool(
        self, pool: ThreadPoolExecutor, request_id: str, prepare: Callable[[], PreparedRequest]
    ) -> PreparedRequest:
        if len(self._starting) >= MAX_PREPARING:
            raise QueueFullError(f"{len(self._starting)} requests are being prepared: the limit")
        self._starting.add(request_id)
        try:
            prepared = await self._loop.run_in_executor(pool, prepare)
        finally:
            self._starting.discard(request_id)
        self._check_accepts()  # much may have happened meanwhile
        return prepared

    def _start(self, prepared: PreparedRequest, deadline: float | None) -> RequestStream:
        if deadline is not None and deadline <= time.monotonic():
            raise TimeoutError("the deadline had passed before the request started")
        stream = RequestStream(self._outputs.add(prepared))
        if deadline is not None:
            delay = deadline - time.monotonic()
            stream.timer = self._loop.call_later(delay, self._expire, stream)
        self._streams[prepared.request_id] = stream
        self._idle.clear()
        for child in prepared.children:
            self._client.send(child)
        return stream

    def _close(self, stream: RequestStream) -> None:
        """The reader has left: after the last output, or (cancelled, closed) before it."""
        request_id = stream.state.request_id
        self._finish(request_id, FinishReason.ABORT)
        if stream.timer is not None:
            stream.timer.cancel()
        self._streams.pop(request_id, None)
        if not self._streams:
            self._idle.set()

    def _finish(self, request_id: str, reason: FinishReason) -> None:
        if running := self._outputs.finish(request_id, reason):
            self._client.send(AbortRequests(running))
        if (stream := self._streams.get(request_id)) is not None:
            stream.wake()

    def _expire(self, stream: RequestStream) -> None:
        if not stream.state.is_finished:
            stream.fail(TimeoutError("the request's deadline has passed"))
            self._finish(stream.state.request_id, FinishReason.ABORT)

    # --- text

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `UnsupportedError` if the engine was started with `skip_tokenizer_init`."""
        return self._inputs.tokenizer

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        return await self._in_text_pool(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        return await self._in_text_pool(
            self.tokenizer.decode, list(ids), skip_special_tokens=skip_special_tokens
        )

    async def render_chat(
        self,
        /,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation, to be encoded without special tokens. `kwargs` go to the
        template.
        """
        return await self._in_text_pool(
            self._inputs.render_chat,
            list(messages),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            **kwargs,
        )

    async def _in_text_pool(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """The tokenizers library releases the GIL: long texts do not stall the streams."""
        return await self._loop.run_in_executor(
            self._text_pool, functools.partial(function, *args, **kwargs)
        )

    # --- state and control

    @property
    def is_dead(self) -> bool:
        return self._dead_error is not None

    @property
    def dead_error(self) -> str | None:
        """Why the core has stopped; None while it runs."""
        return self._dead_error

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False if pages are in use and nothing was done."""
        return bool(await self.call_utility("reset_prefix_cache"))

    async def wait_until_compiled(self) -> int:
        """Wait for executables that are still being compiled while larger ones serve; returns how
        many there are. Requests may run meanwhile.
        """
        return int(await self.call_utility("wait_until_compiled"))

    async def call_utility(self, method: str, *args: Any) -> Any:
        """Result of a rare operation of the core (`memory_plan`, `check_integrity`, ...)."""
        self._check_alive()
        self._num_calls += 1
        call_id = self._num_calls
        future = self._calls[call_id] = self._loop.create_future()
        self._client.send(
            CallUtility(call_id, method, [msgspec.Raw(msgspec.msgpack.encode(arg)) for arg in args])
        )
        try:
            result = await future
        finally:
            del self._calls[call_id]
        if result.error is not None:
            raise JengineError(f"{method}: {result.error}")
        return msgspec.msgpack.decode(result.value)

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, give the open ones `timeout` seconds, then abort the rest."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests are aborted after draining", len(self._streams))
            for request_id in list(self._streams):
                self._finish(request_id, FinishReason.ABORT)

    async def shutdown(self) -> None:
        """Stop the core. Streams that are still open raise `EngineDeadError`. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._client.stop()
        self._die("the engine was shut down")
        await self._loop.run_in_executor(None, self._client.join)
        await self._loop.run_in_executor(None, self._close_inputs)
        self._text_pool.shutdown(wait=False)
        self._grammar_pool.shutdown(wait=False)

    def _check_alive(self) -> None:
        if self._dead_error is not None:
            raise EngineDeadError(self._dead_error)

    def _check_accepts(self) -> None:
        self._check_alive()
        if self._is_draining:
            raise EngineDrainingError("the engine is shutting down and takes no new requests")

    # --- from the core

    def _on_messages(self, messages: list[FromCore]) -> None:
        try:
            for message in messages:
                self._on_message(message)
        except Exception as error:  # the last line of defence: no reader may be left waiting
            logger.exception("the front end failed on a message of the core")
            self._die(f"the front end failed: {type(error).__name__}: {error}")

    def _on_message(self, message: FromCore) -> None:
        match message:
            case StepOutputs():
                self._on_outputs(message)
            case UtilityResult():
                future = self._calls.get(message.call_id)
                if future is not None and not future.done():
                    future.set_result(message)
            case CoreReady():
                if not self._greeting.done():
                    self._greeting.set_result(message)
            case CoreDead():
                self._die(message.error)

    def _on_outputs(self, message: StepOutputs) -> None:
        self.stats = message.stats
        changed, stopped = self._outputs.process(message)
        if stopped:
            self._client.send(AbortRequests(stopped, FinishReason.STOP))
        for state in changed:
            if (stream := self._streams.get(state.request_id)) is not None:
                stream.wake()

    def _die(self, reason: str) -> None:
        """Wake everything that waits for the core; the first reason stands."""
        if self._dead_error is not None:
            return
        self._dead_error = reason
        if not self._is_closed:
            logger.error("engine core is dead: %s", reason)
        for stream in self._streams.values():
            if not stream.state.is_finished:
                stream.fail(EngineDeadError(reason))
        for future in (self._greeting, *self._calls.values()):
            if not future.done():
                future.set_exception(EngineDeadError(reason))
                future.exception()  # counts as seen, also if nobody waits any more
