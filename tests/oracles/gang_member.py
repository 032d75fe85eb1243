"""One process of a gang: `python -m tests.oracles.gang_member JSON`, see `Member`.

A follower prints the digest of each step's arrays. What they ought to be is `step_of(number)`.
"""

import ctypes
import hashlib
import sys
import time

import msgspec
import numpy as np

from jengine.distributed.channel import GangSettings, form_gang, join_gang
from jengine.distributed.protocol import GangError, GangTiming, ProgramCall
from jengine.distributed.watchdog import StepWatchdog, end_process

PROGRAMS = ("decode", "prefill", "set_pages")


class Member(msgspec.Struct):
    rank: int
    num_processes: int
    steps_address: str
    control_address: str
    timing: tuple[float, float, float]
    num_steps: int = 20
    step_seconds: float = 0.0
    facts: dict[str, str] = msgspec.field(default_factory=lambda: {"sources": "one"})
    keys: dict[str, str] = msgspec.field(
        default_factory=lambda: {name: f"key of {name}" for name in PROGRAMS}
    )
    stuck_at: int = 0  # the step in which a follower blocks
    holds_lock: bool = False  # and with it the interpreter's lock
    limit: float = 60.0  # of the watchdog
    payload: int = 16  # numbers in the packed array
    raises_at: int = 0


def step_of(number: int, payload: int = 16) -> ProgramCall:
    rng = np.random.default_rng(number)
    packed = rng.integers(-(2**31), 2**31, payload, np.int32)
    if number % 3:
        return ProgramCall("decode", (packed,))
    if number % 2:
        return ProgramCall("set_pages", (np.int32(number)[...], packed.reshape(2, -1)))
    return ProgramCall("prefill", (packed, rng.integers(0, 9, (2, 3), np.int32)))


def fingerprint(call: ProgramCall) -> str:
    digest = hashlib.md5(call.program.encode())
    for array in call.arrays:
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def lead(member: Member, settings: GangSettings) -> None:
    with form_gang(settings) as channel:
        print("formed", flush=True)
        for number in range(1, member.num_steps + 1):
            if number == member.raises_at:
                raise RuntimeError("the leader's own trouble")
            channel.send(step_of(number, member.payload))
            time.sleep(member.step_seconds)


def follow(member: Member, settings: GangSettings) -> None:
    with join_gang(settings) as channel:
        watchdog = StepWatchdog(member.limit, channel.fail, backstop=1.0)
        print("joined", flush=True)
        number = 0
        while (call := channel.receive()) is not None:
            number += 1
            with watchdog.step(f"step {number}"):
                print(fingerprint(call), flush=True)
                if number == member.stuck_at:
                    # PyDLL keeps the interpreter's lock while it calls
                    (ctypes.PyDLL(None).sleep if member.holds_lock else time.sleep)(60)


def main() -> None:
    member = msgspec.json.decode(sys.argv[1], type=Member)
    settings = GangSettings(
        member.rank,
        member.num_processes,
        member.steps_address,
        member.control_address,
        member.facts,
        member.keys,
        GangTiming(*member.timing),
    )
    try:
        (follow if member.rank else lead)(member, settings)
    except GangError as error:
        end_process(error.exit_code, str(error))


if __name__ == "__main__":
    main()
