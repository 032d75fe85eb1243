"""Several replicas on one host, seen as one: they start together, are watched, and drain together.

It routes nothing: a router in front of all hosts does. Names, ports and endpoints are those of
vLLM's `--data-parallel-multi-port-external-lb`; the restart of single replicas is ours.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
from collections.abc import Callable, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jengine.errors import ExitCode
from jengine.server import follow
from jengine.server.http_errors import json_response
from jengine.server.http_server import QuietServer, open_socket
from jengine.server.replica_process import ReplicaProcess, ReplicaStatus
from jengine.server.replicas import Replica, SupervisorSettings
from jengine.server.settings import ServerSettings

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 1.0
LAST_BACKOFF_SECONDS = 60.0
# What `jengine serve` ends with when a restart would fail in the same way: flags that do not
# parse, and ours.
HOPELESS = (2, ExitCode.CONFIG)

MakeCommand = Callable[[Replica], Sequence[str]]


class Supervisor:
    """`run` returns the exit code of the whole: 0 drained, 75 a replica was lost, 78 one could not
    start and never will. `request_stop` drains; a second time is passed on to the replicas, which
    then end at once.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        make_command: MakeCommand,
        server: ServerSettings,
        settings: SupervisorSettings,
    ) -> None:
        self._settings = settings
        self._server = server
        self._processes = [ReplicaProcess(r, make_command(r), server, settings) for r in replicas]
        self._stop = asyncio.Event()
        self._is_stopping = False

    @property
    def num_serving(self) -> int:
        return sum(p.status is ReplicaStatus.SERVING for p in self._processes)

    @property
    def is_ready(self) -> bool:
        """Whether a balancer may send requests here: to all replicas, or to those that serve."""
        needed = 1 if self._settings.on_failure == "restart" else len(self._processes)
        return not self._is_stopping and self.num_serving >= needed

    @property
    def is_healthy(self) -> bool:
        """Whether the launcher should leave this host alone. With "stop" that is readiness, as in
        vLLM; with "restart" a replica that is being replaced is no reason to end the others.
        """
        if self._settings.on_failure == "stop":
            return self.is_ready
        return not self._is_stopping and any(p.has_served for p in self._processes)

    def request_stop(self) -> None:
        if self._stop.is_set():
            for process in self._processes:
                process.send_signal(signal.SIGTERM)
        self._stop.set()

    def install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop)

    async def run(self) -> int:
        port = self._settings.port
        address = dataclasses.replace(self._server, port=port, uds=None)
        listener = open_socket(address)  # first: a taken port must not cost a start
        config = uvicorn.Config(
            create_app(self), log_config=None, access_log=False, server_header=False, lifespan="off"
        )
        http = QuietServer(config)
        http_task = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            return await self._live()
        finally:
            http.should_exit = True
            await http_task

    async def _live(self) -> int:
        keepers = [asyncio.ensure_future(self._keep(process)) for process in self._processes]
        stop = asyncio.ensure_future(self._stop.wait())
        done, _ = await asyncio.wait((stop, *keepers), return_when=asyncio.FIRST_COMPLETED)
        self._is_stopping = True
        for task in (stop, *keepers):
            task.cancel()
        results = await asyncio.gather(*keepers, return_exceptions=True)
        started = [process for process in self._processes if process.pid is not None]
        hopeless = [p for p in started if p.exit_code in HOPELESS and not p.has_served]
        running = [process for process in started if process.exit_code is None]
        codes = await asyncio.gather(*(process.stop() for process in running))
        for result in results:
            if isinstance(result, Exception):
                raise result
        if hopeless:
            logger.error("a replica cannot start as it was told to: see its messages above")
            return ExitCode.CONFIG
        if stop in done and not any(codes):
            logger.info("all replicas have drained")
            return ExitCode.DRAINED
        return ExitCode.RESTART

    async def _keep(self, process: ReplicaProcess) -> None:
        """Returns once the whole must end on account of this replica."""
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            process.has_served = False
            await process.start()
            why = await process.watch()
            is_hopeless = process.exit_code in HOPELESS and not process.has_served
            logger.error("replica lost: %s", why)
            if self._settings.on_failure == "stop" or is_hopeless:
                return
            await process.stop()
            backoff = FIRST_BACKOFF_SECONDS if process.has_served else backoff
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF_SECONDS)

    def report(self) -> dict[str, object]:
        return {
            "ready": self.is_ready,
            "replicas": [
                {
                    "rank": process.replica.rank,
                    "port": process.replica.port,
                    "grpc_port": process.replica.grpc_port,
                    "pid": process.pid,
                    "status": process.status.value,
                    "num_starts": process.num_starts,
                }
                for process in self._processes
            ],
        }


def create_app(supervisor: Supervisor) -> Starlette:
    """Probes for launchers and balancers; the body says how each replica does."""

    async def health(request: Request) -> Response:
        return json_response(supervisor.report(), 200 if supervisor.is_healthy else 503)

    async def ready(request: Request) -> Response:
        return json_response(supervisor.report(), 200 if supervisor.is_ready else 503)

    return Starlette(
        routes=[Route("/health", health), Route("/ready", ready), Route("/readyz", ready)]
    )


def run_supervisor(supervisor_of: Callable[[], Supervisor], *, follow_stdin: bool = False) -> int:
    """Until a signal or the loss of a replica; returns the exit code."""

    async def supervise() -> int:
        supervisor = supervisor_of()
        supervisor.install_signals()
        if follow_stdin:
            follow.follow_stdin(supervisor.request_stop)
        return await supervisor.run()

    return asyncio.run(supervise())
