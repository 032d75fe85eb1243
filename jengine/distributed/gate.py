"""What a follower lets through; whom a leader lets in, and whom both count as alive. Pure: time is
told.
"""

from collections.abc import Iterable, Mapping, Sequence

from jengine.distributed.codec import StepHeader, decode_step
from jengine.distributed.protocol import (
    LEADER,
    WIRE_VERSION,
    GangError,
    Hello,
    ProgramCall,
    differences,
)
from jengine.errors import ExitCode


class StepGate:
    """Steps of one epoch, each once, in order, for programs that are the same here."""

    def __init__(self, epoch: int, keys: Mapping[str, str]) -> None:
        self.num_taken = 0
        self._epoch = epoch
        self._keys = keys

    def take(self, frames: Sequence[bytes]) -> ProgramCall | None:
        """The next step, None at the leader's orderly end. Raises `GangError` for anything that is
        not the next step.
        """
        header, inputs = decode_step(frames)
        self._check(header)
        self.num_taken = header.number
        return inputs

    def _check(self, header: StepHeader) -> None:
        if header.epoch != self._epoch:
            raise GangError(
                f"a step of epoch {header.epoch:x} came in epoch {self._epoch:x}: "
                "its sender is of an earlier gang"
            )
        expected = self.num_taken + 1
        if header.number > expected:
            lost = header.number - expected
            raise GangError(f"step {header.number} came instead of {expected}: {lost} missing")
        if header.number < expected:
            raise GangError(
                f"step {header.number} came after {self.num_taken}: repeated or out of order"
            )
        if (call := header.call) is None:
            return
        ours = self._keys.get(call.program)
        if ours is None:
            raise GangError(
                f"step {header.number} runs program {call.program!r}, which is not here",
                ExitCode.CONFIG,
            )
        if ours != call.key:
            raise GangError(
                f"step {header.number}: program {call.program!r} is {ours} here "
                f"and {call.key} at the leader",
                ExitCode.CONFIG,
            )


class Roster:
    """Who has come, on the leader's side."""

    def __init__(self, num_processes: int, facts: Mapping[str, str]) -> None:
        self.peers: dict[bytes, int] = {}  # address on the control plane -> rank
        self._num_processes = num_processes
        self._facts = facts

    @property
    def missing(self) -> list[int]:
        return sorted(set(range(1, self._num_processes)) - set(self.peers.values()))

    def admit(self, peer: bytes, hello: Hello) -> None:
        """Raises `GangError` if the gang cannot form with this one, and so not at all."""
        rank = hello.rank
        if hello.wire_version != WIRE_VERSION:
            raise GangError(
                f"rank {rank} speaks version {hello.wire_version} of the step protocol, "
                f"the leader {WIRE_VERSION}",
                ExitCode.CONFIG,
            )
        if hello.num_processes != self._num_processes:
            raise GangError(
                f"rank {rank} expects {hello.num_processes} processes, "
                f"the leader {self._num_processes}",
                ExitCode.CONFIG,
            )
        if not LEADER < rank < self._num_processes:
            raise GangError(
                f"a follower's rank must be from 1 to {self._num_processes - 1}, got {rank}",
                ExitCode.CONFIG,
            )
        if found := differences(self._facts, hello.facts):
            raise GangError(
                f"rank {rank} is not what the leader is: {'; '.join(found)}", ExitCode.CONFIG
            )
        if rank in self.peers.values():
            raise GangError(
                f"rank {rank} came twice: it was restarted, or two processes have its number"
            )
        self.peers[peer] = rank


class Pulse:
    """When each rank was last heard of."""

    def __init__(self, ranks: Iterable[int], lost: float, now: float) -> None:
        self._lost = lost
        self._heard = dict.fromkeys(ranks, now)

    def hear(self, rank: int, now: float) -> None:
        if rank in self._heard:
            self._heard[rank] = now

    def forget(self, rank: int) -> None:
        """It ended in good order."""
        self._heard.pop(rank, None)

    @property
    def ranks(self) -> list[int]:
        return sorted(self._heard)

    def find_lost(self, now: float) -> str | None:
        """Who has been silent too long, in words."""
        silent = {r: now - t for r, t in sorted(self._heard.items()) if now - t > self._lost}
        if not silent:
            return None
        said = ", ".join(f"rank {rank} for {seconds:.1f} s" for rank, seconds in silent.items())
        return f"lost: nothing was heard of {said}"
