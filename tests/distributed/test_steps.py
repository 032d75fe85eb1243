"""The pure parts: frames, the gate, the roster, the pulse."""

import ml_dtypes
import numpy as np
import pytest

from jengine.config import EngineConfig
from jengine.distributed.codec import decode_step, encode_step
from jengine.distributed.gate import Pulse, Roster, StepGate
from jengine.distributed.protocol import (
    GangError,
    GangTiming,
    Hello,
    ProgramCall,
    facts_of,
)
from jengine.distributed.watchdog import StepWatchdog

KEYS = {"decode": "a1", "set_row": "b2"}
ROW = (
    np.int32(3)[...],
    np.array([True, False]),
    np.array([[-np.inf, 0.5]], np.float32),
    np.array([1.5, -2.0], ml_dtypes.bfloat16),
)
STEP = ProgramCall("decode", (np.arange(7, dtype=np.int32), np.array([[1, -1]], np.int32), *ROW))


def test_a_step_comes_out_as_it_went_in() -> None:
    header, found = decode_step(encode_step(5, 9, STEP, KEYS))
    assert (header.epoch, header.number) == (5, 9)
    assert found is not None and found.program == "decode"
    for ours, theirs in zip(STEP.arrays, found.arrays, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(ours, theirs)
        assert not theirs.flags.writeable
    # A view, as a slice of a larger buffer: its bytes, not the buffer's.
    strided = ProgramCall("decode", (np.arange(20, dtype=np.int32)[::2],))
    again = decode_step(encode_step(1, 1, strided, KEYS))[1]
    assert again is not None
    np.testing.assert_array_equal(again.arrays[0], np.arange(0, 20, 2))
    assert decode_step(encode_step(1, 2, None, KEYS))[1] is None
    assert decode_step(encode_step(1, 1, ProgramCall("decode", ()), KEYS))[1] is not None


def test_any_byte_that_changes_is_noticed() -> None:
    frames = encode_step(5, 9, STEP, KEYS)
    for index, frame in enumerate(frames):
        for position in range(len(frame)):
            changed = bytearray(frame)
            changed[position] ^= 1
            tampered = [*frames[:index], bytes(changed), *frames[index + 1 :]]
            with pytest.raises(GangError, match="digest is wrong"):
                decode_step(tampered)
    with pytest.raises(GangError, match="digest is wrong"):
        decode_step(frames[:-1] if frames[-1] else frames[:3])
    with pytest.raises(GangError, match="digest is wrong"):
        decode_step([*frames, b"more"])
    with pytest.raises(GangError, match="digest is wrong"):
        decode_step([])


def test_only_arrays_of_steps_are_sent() -> None:
    with pytest.raises(TypeError, match="int64"):
        encode_step(1, 1, ProgramCall("decode", (np.zeros(1, np.int64),)), KEYS)
    with pytest.raises(KeyError):
        encode_step(1, 1, ProgramCall("unknown", (np.zeros(1, np.int32),)), KEYS)


def frames_of(number: int, epoch: int = 5, keys: dict[str, str] = KEYS) -> list[bytes]:
    return encode_step(epoch, number, STEP, keys)


@pytest.mark.parametrize(
    ("frames", "message", "exit_code"),
    [
        (frames_of(4), "step 4 came instead of 3: 1 missing", 75),
        (frames_of(2), "step 2 came after 2: repeated or out of order", 75),
        (frames_of(1), "step 1 came after 2: repeated or out of order", 75),
        (frames_of(3, epoch=4), "epoch 4 came in epoch 5", 75),
        (frames_of(3, keys={**KEYS, "decode": "c3"}), "'decode' is a1 here and c3 at the", 78),
        (
            encode_step(5, 3, ProgramCall("x", STEP.arrays), {"x": "y"}),
            "program 'x', which is not here",
            78,
        ),
        (encode_step(5, 4, None, KEYS), "step 4 came instead of 3", 75),
    ],
)
def test_the_gate_lets_only_the_next_step_through(
    frames: list[bytes], message: str, exit_code: int
) -> None:
    gate = StepGate(5, KEYS)
    assert gate.take(frames_of(1)) is not None
    assert gate.take(frames_of(2)) is not None
    with pytest.raises(GangError, match=message) as caught:
        gate.take(frames)
    assert caught.value.exit_code == exit_code
    assert gate.num_taken == 2
    assert gate.take(frames_of(3)) is not None
    assert gate.take(encode_step(5, 4, None, KEYS)) is None


FACTS = {"sources": "s", "jax": "1"}


@pytest.mark.parametrize(
    ("hello", "message", "exit_code"),
    [
        (Hello(2, 3, {**FACTS, "jax": "2"}), "rank 2 .*jax: 2 there, 1 at the leader", 78),
        (Hello(2, 3, {"sources": "s"}), "jax: nothing there, 1 at the leader", 78),
        (Hello(2, 3, {**FACTS, "more": "x"}), "more: x there, nothing at the leader", 78),
        (Hello(2, 4, FACTS), "rank 2 expects 4 processes, the leader 3", 78),
        (Hello(0, 3, FACTS), "from 1 to 2, got 0", 78),
        (Hello(3, 3, FACTS), "from 1 to 2, got 3", 78),
        (Hello(2, 3, FACTS, wire_version=99), "speaks version 99", 78),
        (Hello(1, 3, FACTS), "rank 1 came twice", 75),
    ],
)
def test_who_does_not_fit_is_not_admitted(hello: Hello, message: str, exit_code: int) -> None:
    roster = Roster(3, FACTS)
    roster.admit(b"a", Hello(1, 3, dict(FACTS)))
    assert roster.missing == [2]
    with pytest.raises(GangError, match=message) as caught:
        roster.admit(b"b", hello)
    assert caught.value.exit_code == exit_code
    roster.admit(b"c", Hello(2, 3, dict(FACTS)))
    assert roster.peers == {b"a": 1, b"c": 2}
    assert roster.missing == []


def test_facts_are_those_that_programs_depend_on() -> None:
    config = EngineConfig.from_kwargs("m", max_num_seqs=4)
    facts = facts_of(config, "sources")
    assert facts == facts_of(EngineConfig.from_kwargs("m", max_num_seqs=4), "sources")
    assert facts == facts_of(
        EngineConfig.from_kwargs("m", max_num_seqs=4, cache_dir="x"), "sources"
    )
    other = facts_of(EngineConfig.from_kwargs("m", max_num_seqs=5), "sources")
    assert {name for name in facts if facts[name] != other[name]} == {"configuration (scheduler)"}
    assert facts["version of jax"][0].isdigit()


def test_silence_is_noticed_and_a_goodbye_is_none() -> None:
    pulse = Pulse([1, 2, 3], lost=10.0, now=100.0)
    pulse.hear(2, 105.0)
    pulse.hear(7, 105.0)
    pulse.forget(3)
    assert pulse.find_lost(110.0) is None
    assert pulse.find_lost(110.5) == "lost: nothing was heard of rank 1 for 10.5 s"
    assert pulse.find_lost(116.0) == (
        "lost: nothing was heard of rank 1 for 16.0 s, rank 2 for 11.0 s"
    )
    assert pulse.ranks == [1, 2]


def test_limits() -> None:
    default = GangTiming()
    assert default.lost + default.heartbeat < 20
    with pytest.raises(ValueError, match="must exceed two heartbeats"):
        GangTiming(heartbeat=5.0, lost=10.0)
    with pytest.raises(ValueError, match="limit must be > 0"):
        StepWatchdog(0.0)
