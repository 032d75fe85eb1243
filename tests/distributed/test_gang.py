"""Gangs of real processes over real sockets: killed, stopped, lied to, mismatched, blocked.
Whatever happens, all of them end, with a reason and the right code."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from tests.oracles.gang_member import PROGRAMS, Member, fingerprint, step_of
from tests.server.harness import free_port, wait_for

REPO = Path(__file__).resolve().parents[2]
FAST = (20.0, 0.2, 1.0)
DEFAULT = (20.0, 2.0, 10.0)  # where nobody is lost: a busy machine must not look like a loss
MANY = 100_000


def slow(*values: Any) -> Any:
    """Parameters of a test: the pure parts' tests say the same, these add the processes."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Gang:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def out(self, rank: int) -> list[str]:
        return (self.folder / f"out{rank}").read_text().split()

    def err(self, rank: int) -> str:
        return (self.folder / f"err{rank}").read_text()

    def codes(self, *ranks: int, within: float = 15.0) -> list[int]:
        deadline = time.monotonic() + within
        return [self.processes[r].wait(max(0.01, deadline - time.monotonic())) for r in ranks]

    def wait_running(self) -> None:
        """Until every follower has done steps."""
        wait_for(lambda: all(len(self.out(r)) > 3 for r in self.processes if r), 20.0)

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)


@contextmanager
def gang(
    folder: Path,
    num_processes: int = 3,
    timing: tuple[float, float, float] = DEFAULT,
    steps_through: Callable[[str], str] | None = None,
    each: dict[int, dict[str, Any]] | None = None,
    ranks: range | None = None,
    **common: Any,
) -> Iterator[Gang]:
    """`each`: what single ranks are told; `steps_through`: the leader's address -> what followers
    take for it."""
    running = Gang(folder)
    steps, control = (f"127.0.0.1:{free_port()}" for _ in range(2))
    try:
        for rank in ranks or range(num_processes):
            address = steps_through(steps) if steps_through and rank else steps
            told = common | (each or {}).get(rank, {})
            member = Member(rank, num_processes, address, control, timing, **told)
            words = [sys.executable, "-m", "tests.oracles.gang_member"]
            with (
                (folder / f"out{rank}").open("wb") as out,
                (folder / f"err{rank}").open("wb") as err,
            ):
                running.processes[rank] = subprocess.Popen(
                    [*words, msgspec.json.encode(member).decode()], cwd=REPO, stdout=out, stderr=err
                )
        yield running
    finally:
        for process in running.processes.values():
            process.kill()
            process.wait()


def test_every_follower_gets_every_step_and_all_end_well(tmp_path: Path) -> None:
    with gang(tmp_path, num_steps=200) as running:
        assert running.codes(0, 1, 2) == [0, 0, 0], running.err(0)
        expected = [fingerprint(step_of(number)) for number in range(1, 201)]
        assert running.out(1) == running.out(2) == ["joined", *expected]
        assert running.err(1) == ""


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (0, signal.SIGKILL),
        (2, signal.SIGKILL),
        (2, signal.SIGSTOP),
        slow(0, signal.SIGSTOP),
    ],
)
def test_a_lost_process_ends_the_gang(tmp_path: Path, victim: int, how: signal.Signals) -> None:
    with gang(tmp_path, timing=FAST, num_steps=MANY, step_seconds=0.01) as running:
        running.wait_running()
        running.send(victim, how)
        others = [rank for rank in range(3) if rank != victim]
        assert running.codes(*others, within=5.0) == [75, 75]
        if victim and how is signal.SIGKILL:  # the next step tells
            assert f"rank {victim} cannot be reached" in running.err(0)
        else:
            assert f"nothing was heard of rank {victim} for" in running.err(others[0])
        if how is signal.SIGSTOP:  # whoever comes back does not go on alone
            running.send(victim, signal.SIGCONT)
            assert running.codes(victim, within=5.0) == [75]
            assert "fatal: " in running.err(victim)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_within_twenty_seconds_by_default(tmp_path: Path, victim: int, how: signal.Signals) -> None:
    with gang(tmp_path, num_steps=MANY, step_seconds=0.01) as running:
        running.wait_running()
        running.send(victim, how)
        started = time.monotonic()
        others = [rank for rank in range(3) if rank != victim]
        assert running.codes(*others, within=20.0) == [75, 75]
        print(f"{how.name} of rank {victim}: {time.monotonic() - started:.1f} s")


class Proxy:
    """Stands between the leader's step socket and one follower's, and does one thing wrong."""

    def __init__(self, wrong: Callable[[list[list[bytes]]], list[list[bytes]]]) -> None:
        self._wrong = wrong
        self._port = free_port()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._leader = ""

    def __call__(self, leader: str) -> str:
        self._leader = leader
        self._thread.start()
        return f"127.0.0.1:{self._port}"

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        """Attachments pass; steps 1 and 2 pass; 3, 4 and 5 are handed to `wrong` together."""
        with zmq.Context() as context, context.socket(zmq.ROUTER) as follower:
            follower.bind(f"tcp://127.0.0.1:{self._port}")
            with context.socket(zmq.DEALER) as leader:
                leader.linger = follower.linger = 0
                leader.setsockopt(zmq.IDENTITY, b"rank 1")
                leader.connect(f"tcp://{self._leader}")
                seen: list[list[bytes]] = []
                while not self._is_over.is_set():
                    if follower.poll(10):
                        leader.send_multipart(follower.recv_multipart()[1:])
                    while leader.poll(10):
                        seen.append(leader.recv_multipart())
                        passed = [seen[-1]] if len(seen) not in (3, 4, 5) else []
                        passed = self._wrong(seen[2:5]) if len(seen) == 5 else passed
                        for frames in passed:
                            follower.send_multipart([b"rank 1", *frames])


def tamper(steps: list[list[bytes]]) -> list[list[bytes]]:
    *frames, last = steps[0]
    return [[*frames, last[:-1] + bytes([last[-1] ^ 1])], *steps[1:]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda steps: steps[1:], "step 4 came instead of 3: 1 missing"),
        (tamper, "a step's digest is wrong: its bytes changed on the way"),
        slow(lambda steps: steps, ""),
        slow(lambda steps: [steps[0], steps[0], *steps[1:]], "step 3 came after 3: repeated"),
        slow(lambda steps: [steps[1], steps[0], steps[2]], "step 4 came instead of 3"),
    ],
    ids=["dropped", "tampered", "nothing", "repeated", "reordered"],
)
def test_a_transport_that_lies(
    tmp_path: Path, wrong: Callable[[list[list[bytes]]], list[list[bytes]]], message: str
) -> None:
    proxy = Proxy(wrong)
    try:
        num_steps = 20 if not message else MANY
        with gang(tmp_path, 2, num_steps=num_steps, step_seconds=0.01, steps_through=proxy) as it:
            expected = [75, 75] if message else [0, 0]
            assert it.codes(0, 1) == expected, it.err(1)
            assert message in it.err(1)
            if message:
                assert f"rank 1 ends: {message}" in it.err(0)
                done = [fingerprint(step_of(number)) for number in range(1, len(it.out(1)))]
                assert it.out(1)[1:] == done  # nothing wrong was let through
    finally:
        proxy.stop()


def test_those_who_differ_never_start(tmp_path: Path) -> None:
    with gang(tmp_path, each={2: {"facts": {"sources": "two"}}}) as running:
        assert running.codes(0, 1, 2) == [78, 78, 78]
        for rank in range(3):
            assert "rank 2 is not what the leader is: sources: two there, one at" in running.err(
                rank
            )
            assert running.out(rank) == []


@pytest.mark.slow
def test_another_executable_is_refused_at_its_first_step(tmp_path: Path) -> None:
    keys = {name: f"key of {name}" for name in PROGRAMS} | {"prefill": "another"}
    with gang(tmp_path, 2, each={1: {"keys": keys}}, num_steps=MANY, step_seconds=0.01) as running:
        assert running.codes(0, 1) == [78, 78]
        assert "step 3: program 'prefill' is another here and key of prefill" in running.err(1)
        assert len(running.out(1)) == 3


@pytest.mark.slow
def test_one_who_does_not_come(tmp_path: Path) -> None:
    with gang(tmp_path, ranks=range(2), timing=(1.5, 0.2, 1.0)) as running:
        assert running.codes(0, 1) == [75, 75]
        assert "these ranks have not come: 2" in running.err(0)


@pytest.mark.slow
def test_one_who_comes_late_is_refused_and_the_gang_goes_on(tmp_path: Path) -> None:
    with gang(tmp_path, 2, num_steps=300, step_seconds=0.01) as running:
        running.wait_running()
        command = running.processes[1].args
        late = subprocess.run(command, cwd=REPO, capture_output=True, text=True)  # type: ignore[call-overload]
        assert late.returncode == 75
        assert "the gang has formed without you" in late.stderr
        assert running.codes(0, 1) == [0, 0]
        assert len(running.out(1)) == 301


@pytest.mark.slow
def test_the_leaders_own_error_ends_the_followers(tmp_path: Path) -> None:
    with gang(tmp_path, 2, each={0: {"raises_at": 5}}) as running:
        assert running.codes(0, 1) == [75, 75]
        assert "Traceback" in running.err(0)
        assert "the leader ends: RuntimeError: the leader's own trouble" in running.err(1)


@pytest.mark.parametrize("holds_lock", [False, True])
def test_a_step_that_does_not_end(tmp_path: Path, holds_lock: bool) -> None:
    """The follower's heartbeats go on, unless native code holds the interpreter's lock: then
    nothing of Python runs any more, and the kernel's timer ends the process."""
    told = {"stuck_at": 3, "holds_lock": holds_lock, "limit": 0.5}
    with gang(tmp_path, 2, FAST, each={1: told}, num_steps=MANY, step_seconds=0.01) as running:
        assert running.codes(0, 1) == [75, -signal.SIGALRM if holds_lock else 75]
        if not holds_lock:
            assert "step 3 has not ended within 0.5 s" in running.err(1)
            assert "follow" in running.err(1)  # the stack of the main thread
            assert "rank 1 ends: step 3 has not ended" in running.err(0)


@pytest.mark.slow
def test_a_follower_that_takes_nothing_holds_the_leader_back_then_ends_it(tmp_path: Path) -> None:
    """Heartbeats alone do not notice: it is alive. The bound of what is queued does."""
    told = {"stuck_at": 1}
    with gang(tmp_path, 2, FAST, each={1: told}, num_steps=MANY, payload=100_000) as running:
        assert running.codes(0, 1) == [75, 75]
        assert "rank 1 has taken no step for 1 s" in running.err(0)
