"""The server process: both ports on one event loop, from binding them to the exit code.

    loading -> serving -> draining -> exit 0
                       -> dead     -> exit 1

Ports answer from the first moment: health says NOT_SERVING / 503 until a real token has been made.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from jengine.async_engine import AsyncEngine
from jengine.config import EngineConfig
from jengine.errors import JengineError
from jengine.request import SamplingParams
from jengine.server.grpc_server import GrpcServer
from jengine.server.http_server import HttpServer
from jengine.server.metrics import ServerMetrics, ThroughputMeter
from jengine.server.settings import ServerSettings
from jengine.server.state import ServerState, Status

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1  # a dead core shows in health within this
METER_SECONDS = 1.0
STATS_SECONDS = 10.0
FLUSH_SECONDS = 2.0  # for last messages to leave after the engine is done with them
EXIT_OK = 0
EXIT_FAILED = 1

CreateEngine = Callable[[EngineConfig], Awaitable[AsyncEngine]]


class ServerApp:
    """One server. `run` returns the exit code; `request_stop` may be called twice: the second time
    in earnest.
    """

    def __init__(
        self,
        config: EngineConfig,
        settings: ServerSettings,
        *,
        create_engine: CreateEngine = AsyncEngine.create,
    ) -> None:
        names = config.model.served_model_name or (config.model.model,)
        metrics = ServerMetrics(names[0])
        self.state = ServerState(settings=settings, config=config, metrics=metrics)
        self._create_engine = create_engine
        self._meter = ThroughputMeter()
        self._has_http = settings.port is not None or settings.uds is not None
        self._http = HttpServer(self.state) if self._has_http else None
        self._grpc = GrpcServer(self.state, self._meter) if settings.grpc_port is not None else None
        self._num_stops = 0
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    @property
    def http_port(self) -> int | None:
        return self._http.port if self._http else None

    @property
    def grpc_port(self) -> int | None:
        return self._grpc.port if self._grpc else None

    def request_stop(self) -> None:
        """Drain and end; asked again, end at once."""
        self._num_stops += 1
        self._stop.set()
        if self._num_stops > 1:
            self._stop_now.set()

    def install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop)

    async def run(self, on_listening: Callable[[], None] | None = None) -> int:
        http_task = asyncio.create_task(self._http.serve()) if self._http else None
        try:
            if self._grpc:
                await self._grpc.start()
            if on_listening:
                on_listening()
            code = await self._live()
        finally:
            await self._close(http_task)
        return code

    async def _live(self) -> int:
        if not await self._load():
            return EXIT_OK if self._stop.is_set() else EXIT_FAILED
        if self._grpc:
            await self._grpc.set_serving(True)
        logger.info("serving %s", self.state.model_name)
        await self._watch()
        if self._grpc:
            await self._grpc.set_serving(False)
        if self.state.status is Status.DEAD:
            await self._linger()
            return EXIT_FAILED
        await self._drain()
        return EXIT_OK

    async def _load(self) -> bool:
        """Build the engine and make one token with it. False: stopped meanwhile, or failed."""
        task = asyncio.ensure_future(self._build())
        stop = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return False
        try:
            engine = task.result()
        except (JengineError, OSError, ValueError) as error:
            logger.error("the model could not be loaded: %s", error)
            self.state.load_error = str(error)
            return False
        self.state.engine = engine
        self.state.metrics.watch_engine(lambda: engine.stats, self.state.config.cache)
        return True

    async def _build(self) -> AsyncEngine:
        engine = await self._create_engine(self.state.config)
        logger.info("memory plan\n%s", engine.ready.memory_plan)
        first_id = engine.model_info.bos_token_id or 0
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        async with aclosing(engine.generate([first_id], params, "warm-up")) as outputs:
            async for _ in outputs:
                pass
        return engine

    async def _watch(self) -> None:
        """Until a stop is requested or the core is dead."""
        engine = self.state.ready_engine()
        next_sample = next_line = time.monotonic()
        steps_seen = 0
        while not self._stop.is_set() and not engine.is_dead:
            now = time.monotonic()
            if now >= next_sample:
                self._meter.sample(now, engine.stats.num_generation_tokens)
                next_sample = now + METER_SECONDS
                await self.state.end_unread()
            if now >= next_line and engine.stats.num_steps > steps_seen:
                steps_seen, next_line = engine.stats.num_steps, now + STATS_SECONDS
                self._log_stats()
            await _wait(self._stop, WATCH_SECONDS)

    def _log_stats(self) -> None:
        """A line every ten seconds in which something ran."""
        if self.state.config.disable_log_stats:
            return
        stats = self.state.ready_engine().stats
        fields = {
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "pages_used": stats.num_pages_used,
            "pages_total": stats.num_pages_total,
            "tokens_per_second": round(self._meter.tokens_per_second, 1),
            "prefix_hit_rate": round(stats.prefix_hits / max(stats.prefix_queries, 1), 3),
            "preemptions": stats.num_preemptions,
        }
        if stats.num_compiling:
            fields["executables_compiling"] = stats.num_compiling
        logger.info("stats", extra={"fields": fields})

    async def _linger(self) -> None:
        """Balancers and people get to see that the engine is dead, then the supervisor restarts the
        process.
        """
        assert self.state.engine is not None
        logger.error("the engine is dead: %s", self.state.engine.dead_error)
        await _wait(self._stop, self.state.settings.dead_linger)

    async def _drain(self) -> None:
        """New requests are refused, running ones may finish, the rest is aborted."""
        timeout = self.state.settings.shutdown_timeout
        logger.info("draining %d requests for at most %g s", self.state.num_active, timeout)
        self.state.is_draining = True
        engine = self.state.engine
        assert engine is not None
        drain = asyncio.ensure_future(engine.drain(timeout))
        now = asyncio.ensure_future(self._stop_now.wait())
        await asyncio.wait((drain, now), return_when=asyncio.FIRST_COMPLETED)
        now.cancel()
        if not drain.done():
            drain.cancel()
            await asyncio.gather(drain, return_exceptions=True)
            await engine.drain(0.0)
        until = time.monotonic() + FLUSH_SECONDS
        while self.state.num_active and time.monotonic() < until:
            await asyncio.sleep(WATCH_SECONDS)

    async def _close(self, http_task: asyncio.Task[None] | None) -> None:
        self.state.is_draining = True
        if self._grpc:
            await self._grpc.stop(FLUSH_SECONDS)
        if self._http and http_task:
            self._http.stop()
            await http_task
        if self.state.engine is not None:
            await self.state.engine.shutdown()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
