"""One replica as a child process: started, probed, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import signal
import ssl
from collections.abc import Sequence
from enum import StrEnum

from jengine.config import child_environment
from jengine.server.replicas import Replica, SupervisorSettings
from jengine.server.settings import ServerSettings

logger = logging.getLogger(__name__)

EXIT_GRACE_SECONDS = 5.0  # beyond the time that running requests get
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ReplicaStatus(StrEnum):
    STARTING = "starting"
    SERVING = "serving"
    FAILED = "failed"  # the process lives, but is not healthy any more
    ENDED = "ended"


class ReplicaProcess:
    """`start`, then `watch` until it returns, then `stop`; again from `start` for a restart."""

    def __init__(
        self,
        replica: Replica,
        command: Sequence[str],
        server: ServerSettings,
        settings: SupervisorSettings,
    ) -> None:
        self.replica = replica
        self.status = ReplicaStatus.ENDED
        self.has_served = False
        self.num_starts = 0
        self._command = command
        self._server = server
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Negative: the signal that ended it. None while it runs."""
        return None if self._process is None else self._process.returncode

    async def start(self) -> None:
        gpus = ",".join(self.replica.gpus)
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            # Never written to. Its end of file tells the child that we are gone.
            stdin=asyncio.subprocess.PIPE,
            env=child_environment({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}),
            start_new_session=True,  # a terminal's Ctrl-C is for the supervisor, which drains
        )
        self.num_starts += 1
        self.status = ReplicaStatus.STARTING
        logger.info(
            "replica %d started",
            self.replica.rank,
            extra={"fields": {"pid": self.pid, "port": self.replica.port, "gpus": gpus}},
        )

    async def watch(self) -> str:
        """Until the replica is lost; says how."""
        assert self._process is not None
        ended = asyncio.ensure_future(self._process.wait())
        try:
            num_unanswered = 0
            while not ended.done():
                is_healthy = await self._probe()
                num_unanswered = num_unanswered + 1 if is_healthy is None else 0
                if is_healthy and not ended.done():
                    self._note_serving()
                elif self.status is ReplicaStatus.SERVING and (
                    is_healthy is False or num_unanswered >= self._settings.probe_failures
                ):
                    self.status = ReplicaStatus.FAILED
                    what = "it said so" if is_healthy is False else f"{num_unanswered} times silent"
                    return f"rank {self.replica.rank} is not healthy: {what}"
                await asyncio.wait((ended,), timeout=self._settings.probe_interval)
        finally:
            ended.cancel()
        self.status = ReplicaStatus.ENDED
        return f"rank {self.replica.rank} has ended with {_describe(self.exit_code)}"

    async def stop(self) -> int:
        """SIGTERM, which drains; SIGKILL once the drain has had its time, which a replica that has
        failed is not given. Returns the exit code.
        """
        process = self._process
        assert process is not None
        drain = 0.0 if self.status is ReplicaStatus.FAILED else self._server.shutdown_timeout
        self.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(drain + EXIT_GRACE_SECONDS):
                await process.wait()
        except TimeoutError:
            logger.warning("rank %d did not end in time: killed", self.replica.rank)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self.status = ReplicaStatus.ENDED
        return await process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _note_serving(self) -> None:
        if self.status is not ReplicaStatus.SERVING:
            self.status = ReplicaStatus.SERVING
            self.has_served = True
            logger.info("replica %d serves", self.replica.rank)

    async def _probe(self) -> bool | None:
        """What GET /health says; None: nothing."""
        return await asyncio.to_thread(self._ask_health)

    def _ask_health(self) -> bool | None:
        host = ANY_ADDRESS.get(self._server.host, self._server.host)
        timeout = self._settings.probe_timeout
        if self._server.ssl_certfile is None:
            connection = http.client.HTTPConnection(host, self.replica.port, timeout=timeout)
        else:  # our own child on an address of this host: its certificate names another one
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = http.client.HTTPSConnection(
                host, self.replica.port, timeout=timeout, context=context
            )
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


def _describe(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
