"""The leader's and a follower's end of the step plane, and how a gang forms.

    leader    with form_gang(...) as channel: channel.send(call) for each step
    follower  with join_gang(...) as channel: while (call := channel.receive()) is not None: ...

ROUTER and DEALER sockets with a bound on what may queue up: PUB would drop steps in silence. Steps
are sent by the calling thread itself, since handing them to another would cost a switch of threads,
up to 5 ms. After the gang has formed, errors do not come as exceptions: the process ends, with its
reason on standard error and in everyone else's.
"""

import contextlib
import os
import socket as sockets
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import NoReturn, Self

import msgspec
import zmq

from jengine.cluster import Cluster, join_address
from jengine.distributed.codec import encode_step
from jengine.distributed.control import Control, FollowerLink, LeaderLink
from jengine.distributed.gate import Roster, StepGate
from jengine.distributed.protocol import (
    LEADER,
    GangError,
    GangTiming,
    Hello,
    ProgramCall,
    Refusal,
    Welcome,
)
from jengine.distributed.watchdog import Die, end_process
from jengine.errors import ExitCode

STEPS_PORT = 1  # above the coordinator's
CONTROL_PORT = 2
MAX_QUEUED = 64  # steps for one follower; a leader plans two ahead
_POLL_MS = 200


@dataclass(frozen=True, slots=True)
class GangSettings:
    """How one process takes part. `facts` and `keys` (program -> key of its executable) must be the
    same in all; see `protocol.facts_of`.
    """

    rank: int
    num_processes: int
    steps_address: str  # host:port; of the leader a numeric one, which it binds
    control_address: str
    facts: Mapping[str, str]
    keys: Mapping[str, str]
    timing: GangTiming = field(default_factory=GangTiming)
    die: Die = end_process

    @classmethod
    def of(cls, cluster: Cluster, facts: Mapping[str, str], keys: Mapping[str, str]) -> Self:
        host = _numeric(cluster.bind_host) if cluster.is_leader else cluster.coordinator_host
        return cls(
            cluster.process_id,
            cluster.num_processes,
            join_address(host, cluster.coordinator_port + STEPS_PORT),
            join_address(host, cluster.coordinator_port + CONTROL_PORT),
            facts,
            keys,
        )


class StepChannel:
    """What both ends have in common. Leaving the `with` block is the orderly end; an exception that
    leaves it ends the gang.
    """

    def __init__(self, context: zmq.Context, steps: "zmq.Socket[bytes]", control: Control) -> None:
        self._context = context
        self._steps = steps
        self._control = control

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        traceback.print_exception(error)  # nobody else will: the process ends here
        sys.stderr.flush()
        if not isinstance(error, GangError):
            error = GangError(f"{type(error).__name__}: {error}")
        self._control.fail(error)

    def fail(self, exit_code: int, message: str) -> NoReturn:
        """End the gang, from any thread: what a `StepWatchdog` of this process should call."""
        self._control.fail(GangError(message, ExitCode(exit_code)))

    def close(self) -> None:
        self._control.leave()
        self._steps.close(linger=0)
        self._context.term()


class LeaderChannel(StepChannel):
    """`send` is for one thread. It copies: the arrays may change when it returns."""

    def __init__(
        self,
        context: zmq.Context,
        steps: "zmq.Socket[bytes]",
        control: Control,
        settings: GangSettings,
        epoch: int,
    ) -> None:
        super().__init__(context, steps, control)
        self._settings = settings
        self._epoch = epoch
        self._num_sent = 0

    def send(self, call: ProgramCall) -> None:
        """To every follower, in order. Blocks while one has `MAX_QUEUED` steps to do."""
        self._send(call)

    def close(self) -> None:
        """Followers do what they have, and end; this waits for them."""
        self._send(None)
        self._control.wait_alone()
        super().close()

    def _send(self, call: ProgramCall | None) -> None:
        self._num_sent += 1
        frames = encode_step(self._epoch, self._num_sent, call, self._settings.keys)
        for rank in range(1, self._settings.num_processes):
            try:
                self._steps.send_multipart([_step_identity(rank), *frames])
            except zmq.Again:
                seconds = self._settings.timing.lost
                self._control.fail(GangError(f"rank {rank} has taken no step for {seconds:g} s"))
            except zmq.ZMQError as error:  # EHOSTUNREACH: its connection is gone
                self._control.fail(GangError(f"rank {rank} cannot be reached: {error}"))


class FollowerChannel(StepChannel):
    def __init__(
        self,
        context: zmq.Context,
        steps: "zmq.Socket[bytes]",
        control: Control,
        gate: StepGate,
    ) -> None:
        super().__init__(context, steps, control)
        self._gate = gate

    def receive(self) -> ProgramCall | None:
        """The next step; None once the leader has ended in good order. Blocks without bound: the
        leader's silence ends the process from the control plane's thread.
        """
        try:
            return self._gate.take(self._steps.recv_multipart())
        except GangError as error:
            self._control.fail(error)


def form_gang(settings: GangSettings) -> LeaderChannel:
    """Wait for all followers. Raises `GangError` if one is not like the leader (exit code 78) or
    does not come (75); whoever did come hears the same.
    """
    with _opening() as context, _opening() as control_context:
        control = _socket(control_context, zmq.ROUTER)
        steps = _socket(context, zmq.ROUTER)
        steps.setsockopt(zmq.ROUTER_MANDATORY, 1)
        steps.setsockopt(zmq.SNDTIMEO, int(1000 * settings.timing.lost))
        for socket, address in (
            (control, settings.control_address),
            (steps, settings.steps_address),
        ):
            try:
                socket.bind(f"tcp://{address}")
            except zmq.ZMQError as error:
                raise GangError(f"cannot listen at {address}: {error}") from None
        deadline = time.monotonic() + settings.timing.join
        roster = Roster(settings.num_processes, settings.facts)
        link = LeaderLink(control)
        _gather(link, roster, settings, deadline)
        epoch = int.from_bytes(os.urandom(6))
        for peer in roster.peers:
            link.send(peer, Welcome(epoch))
        _await_attached(steps, epoch, settings, deadline)
        thread = Control(link, roster.peers, epoch, settings.timing, settings.die)
        thread.start()
        return LeaderChannel(context, steps, thread, settings, epoch)


def join_gang(settings: GangSettings) -> FollowerChannel:
    """Greet the leader and wait until all have come. Raises `GangError`."""
    with _opening() as context, _opening() as control_context:
        link = FollowerLink(_socket(control_context, zmq.DEALER))
        link.socket.connect(f"tcp://{settings.control_address}")
        hello = Hello(settings.rank, settings.num_processes, dict(settings.facts))
        # Waits in its queue until there is a leader to connect to.
        link.socket.send(msgspec.msgpack.encode(hello))
        epoch = _await_welcome(link, settings)
        steps = _socket(context, zmq.DEALER)
        steps.setsockopt(zmq.IDENTITY, _step_identity(settings.rank))
        # A connection that was lost may have lost steps.
        steps.setsockopt(zmq.RECONNECT_IVL, -1)
        steps.connect(f"tcp://{settings.steps_address}")
        steps.send(_attachment(epoch))
        peers = {b"": LEADER}
        thread = Control(link, peers, epoch, settings.timing, settings.die)
        thread.start()
        return FollowerChannel(context, steps, thread, StepGate(epoch, settings.keys))


def _gather(link: LeaderLink, roster: Roster, settings: GangSettings, deadline: float) -> None:
    """Until all have come. After a first misfit the others are waited for only as long as a lost
    process would be: so that they, too, hear why, and do not wait for a leader that is gone.
    """
    misfits: list[GangError] = []
    while len(roster.peers) + len(misfits) < settings.num_processes - 1:
        if time.monotonic() > deadline:
            break
        link.socket.poll(_POLL_MS)
        while (received := link.receive()) is not None:
            peer, message = received
            if not isinstance(message, Hello):
                continue
            try:
                roster.admit(peer, message)
            except GangError as error:
                link.send(peer, Refusal(str(error), error.exit_code))
                misfits.append(error)
                deadline = min(deadline, time.monotonic() + settings.timing.lost)
    if not misfits and roster.missing:
        ranks = ", ".join(map(str, roster.missing))
        misfits.append(GangError(f"these ranks have not come: {ranks}"))
    if misfits:
        for peer in roster.peers:
            link.send(peer, Refusal(str(misfits[0]), misfits[0].exit_code))
        raise misfits[0]


def _await_attached(
    steps: "zmq.Socket[bytes]", epoch: int, settings: GangSettings, deadline: float
) -> None:
    """Until every follower's step socket has reached ours: a ROUTER cannot send before."""
    waiting = {_step_identity(rank) for rank in range(1, settings.num_processes)}
    while waiting:
        if time.monotonic() > deadline:
            raise GangError(f"{len(waiting)} followers have not come to {settings.steps_address}")
        if steps.poll(_POLL_MS):
            identity, *frames = steps.recv_multipart()
            if frames == [_attachment(epoch)]:
                waiting.discard(identity)


def _await_welcome(link: FollowerLink, settings: GangSettings) -> int:
    deadline = time.monotonic() + settings.timing.join
    while time.monotonic() < deadline:
        link.socket.poll(_POLL_MS)
        received = link.receive()
        match received and received[1]:
            case Welcome(epoch):
                return epoch
            case Refusal(reason, code):
                raise GangError(f"the leader refuses: {reason}", ExitCode(code))
    raise GangError(f"no leader at {settings.control_address} within {settings.timing.join:g} s")


@contextlib.contextmanager
def _opening() -> Iterator[zmq.Context]:
    """A context that is destroyed if the block fails; refusals get the time to leave."""
    context = zmq.Context(io_threads=1)
    try:
        yield context
    except BaseException:
        context.destroy(linger=500)
        raise


def _socket(context: zmq.Context, kind: int) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.set_hwm(MAX_QUEUED)
    socket.linger = 0
    socket.setsockopt(zmq.IPV6, 1)
    return socket


def _step_identity(rank: int) -> bytes:
    return f"rank {rank}".encode()


def _attachment(epoch: int) -> bytes:
    return epoch.to_bytes(8)


def _numeric(host: str) -> str:
    """ZeroMQ binds addresses, not names."""
    try:
        return str(sockets.getaddrinfo(host, None, type=sockets.SOCK_STREAM)[0][4][0])
    except sockets.gaierror as error:
        raise GangError(f"the leader's own name {host!r} has no address: {error}") from None
