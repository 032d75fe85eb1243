"""The control plane of one process: a thread that proves to live, notices who does not, and says
why the gang ends. Steps do not pass through it, so it goes on while the main thread is in a step.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Mapping
from typing import NoReturn, Protocol

import msgspec
import zmq

from jengine.distributed.gate import Pulse
from jengine.distributed.protocol import (
    LEADER,
    Failure,
    GangError,
    GangTiming,
    Goodbye,
    Heartbeat,
    Hello,
    Refusal,
    ToFollower,
    ToLeader,
)
from jengine.distributed.watchdog import Die
from jengine.errors import ExitCode

LINGER_MS = 500  # for last words to leave, at most
_ONLY_PEER = b""


class Link(Protocol):
    """A control socket: peers by address."""

    socket: zmq.Socket[bytes]

    def send(self, peer: bytes, message: msgspec.Struct) -> None: ...

    def receive(self) -> tuple[bytes, msgspec.Struct] | None:
        """What has arrived; None: nothing (more). Raises `GangError` for what is unreadable."""
        ...


class LeaderLink:
    """To many followers."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self.socket = socket

    def send(self, peer: bytes, message: msgspec.Struct) -> None:
        # Without ROUTER_MANDATORY: what goes to one that is gone is dropped. Its silence tells.
        self.socket.send_multipart([peer, msgspec.msgpack.encode(message)])

    def receive(self) -> tuple[bytes, msgspec.Struct] | None:
        """A stranger's noise is dropped: it must not end the gang."""
        while True:
            try:
                peer, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
                return peer, msgspec.msgpack.decode(b"".join(frames), type=ToLeader)
            except zmq.Again:
                return None
            except msgspec.DecodeError:
                continue


class FollowerLink:
    """To the leader."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self.socket = socket

    def send(self, peer: bytes, message: msgspec.Struct) -> None:
        # Never blocks: where the leader takes nothing any more, its silence tells.
        with contextlib.suppress(zmq.Again):
            self.socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)

    def receive(self) -> tuple[bytes, msgspec.Struct] | None:
        try:
            payload = self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        try:
            return _ONLY_PEER, msgspec.msgpack.decode(payload, type=ToFollower)
        except msgspec.DecodeError as error:
            raise GangError(f"the leader sent an unreadable message: {error}") from None


class Control:
    """Owns the link, and its context, which it shares with nobody, from `start` on. `peers`:
    address -> rank; a follower has one, the leader.
    """

    def __init__(
        self, link: Link, peers: Mapping[bytes, int], epoch: int, timing: GangTiming, die: Die
    ) -> None:
        self._link = link
        self._peers = peers
        self._epoch = epoch
        self._timing = timing
        self._die = die
        self._requests: queue.SimpleQueue[GangError | None] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        self._pulse = Pulse(peers.values(), timing.lost, time.monotonic())
        self._has_left = False
        self._is_alone = threading.Event()
        if not peers:
            self._is_alone.set()
        self._thread = threading.Thread(target=self._run, name="gang-control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def fail(self, error: GangError) -> NoReturn:
        """Tell the others, then end this process."""
        self._ask(error)
        self._thread.join()
        raise AssertionError("the process should have ended") from error

    def leave(self) -> None:
        """Say goodbye, and stop: the silence that follows is none."""
        self._ask(None)
        self._thread.join()
        for descriptor in (self._wake_read, self._wake_write):
            os.close(descriptor)

    def wait_alone(self) -> None:
        """Until all others have left. One that is lost meanwhile still ends the gang."""
        self._is_alone.wait()

    def _ask(self, request: GangError | None) -> None:
        self._requests.put(request)
        os.write(self._wake_write, b"!")

    def _run(self) -> None:
        why = "its control plane has failed"  # unless it is found to be something better
        code = ExitCode.RESTART
        try:
            self._serve()
            return
        except GangError as error:
            why, code = str(error), error.exit_code
            self._say_why(error)
        except (zmq.ZMQError, OSError) as error:
            why = f"its control plane has failed: {error}"
        finally:
            if not self._has_left:
                self._die(code, why)

    def _serve(self) -> None:
        """Until `leave`. Raises `GangError` for whatever ends the gang."""
        poller = zmq.Poller()
        poller.register(self._link.socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        next_beat = time.monotonic()
        while True:
            self._read_all()
            # After reading: a process that was stopped finds what came meanwhile, and does not take
            # its own absence for the others'.
            if lost := self._pulse.find_lost(time.monotonic()):
                raise GangError(lost)
            if time.monotonic() >= next_beat:
                self._tell_all(Heartbeat(self._epoch))
                next_beat = time.monotonic() + self._timing.heartbeat
            wait = max(0.0, next_beat - time.monotonic())
            if self._wake_read in dict(poller.poll(int(1000 * wait) + 1)):
                request = self._requests.get()
                if request is not None:
                    raise request
                self._tell_all(Goodbye(self._epoch))
                self._hang_up()
                self._has_left = True
                return

    def _read_all(self) -> None:
        while (received := self._link.receive()) is not None:
            peer, message = received
            rank = self._peers.get(peer)
            match message:
                case Hello():
                    reason = "the gang has formed without you: all its processes must start anew"
                    self._link.send(peer, Refusal(reason, ExitCode.RESTART))
                case Heartbeat(epoch) if rank is not None and epoch == self._epoch:
                    self._pulse.hear(rank, time.monotonic())
                case Goodbye(epoch) if rank is not None and epoch == self._epoch:
                    self._pulse.forget(rank)
                    if not self._pulse.ranks:
                        self._is_alone.set()
                case Failure(epoch, reason, code) if rank is not None and epoch == self._epoch:
                    speaker = "the leader" if rank == LEADER else f"rank {rank}"
                    raise GangError(f"{speaker} ends: {reason}", ExitCode(code))

    def _tell_all(self, message: msgspec.Struct) -> None:
        for peer in self._peers:
            self._link.send(peer, message)

    def _say_why(self, error: GangError) -> None:
        self._tell_all(Failure(self._epoch, str(error), error.exit_code))
        self._hang_up()

    def _hang_up(self) -> None:
        """Ending the context waits for the last words; closing the socket alone would not."""
        context = self._link.socket.context
        self._link.socket.close(linger=LINGER_MS)
        context.term()
