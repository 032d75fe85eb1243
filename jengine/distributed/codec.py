"""Steps as frames of bytes and back: a header, a digest over all the rest, and each array's bytes.

Pure. A follower believes nothing before the digest is right: then the frames are as the leader made
them, and what is still wrong (order, epoch, key) is wrong about the gang.
"""

import hashlib
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from jengine.distributed.protocol import GangError, ProgramCall, StepInputs
from jengine.errors import ExitCode

DIGEST_BYTES = 16
NUM_LEADING = 2  # frames before the arrays: header, digest
_DTYPES = frozenset({"int32", "uint32", "float32", "bool"})


class CallHeader(msgspec.Struct, array_like=True):
    program: str
    key: str  # of its executable: the same name must mean the same program everywhere
    arrays: list[tuple[str, tuple[int, ...]]]  # dtype, shape


class StepHeader(msgspec.Struct, array_like=True):
    """`calls` ends with the step itself: packed array, then masks if there are any. No calls: the
    leader has ended in good order.
    """

    epoch: int
    number: int  # 1, 2, 3, ... without a gap
    calls: list[CallHeader]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StepHeader)


def encode_step(
    epoch: int, number: int, inputs: StepInputs | None, keys: Mapping[str, str]
) -> list[bytes]:
    """Frames of a step, or of the end. `keys` names the executable of each program; KeyError if one
    is missing.
    """
    calls = [] if inputs is None else [*inputs.admissions, _step_call(inputs)]
    headers = [
        CallHeader(call.program, keys[call.program], [_describe(a) for a in call.arrays])
        for call in calls
    ]
    header = _encoder.encode(StepHeader(epoch, number, headers))
    arrays = [array.tobytes() for call in calls for array in call.arrays]
    return [header, _digest(header, arrays), *arrays]


def decode_step(frames: Sequence[bytes]) -> tuple[StepHeader, StepInputs | None]:
    """Raises `GangError` if these are not the frames that the leader made. Arrays are views of the
    frames: no copy, read-only.
    """
    if len(frames) < NUM_LEADING or frames[1] != _digest(frames[0], frames[NUM_LEADING:]):
        raise GangError("a step's digest is wrong: its bytes changed on the way")
    try:
        header = _decoder.decode(frames[0])
    except msgspec.DecodeError as error:
        raise GangError(f"a step's header is unreadable: {error}", ExitCode.CONFIG) from None
    rest = iter(frames[NUM_LEADING:])
    calls = [
        ProgramCall(
            call.program,
            tuple(np.frombuffer(next(rest), dtype).reshape(shape) for dtype, shape in call.arrays),
        )
        for call in header.calls
    ]
    if not calls:
        return header, None
    *admissions, step = calls
    packed, *masks = step.arrays
    return header, StepInputs(step.program, packed, masks[0] if masks else None, tuple(admissions))


def _step_call(inputs: StepInputs) -> ProgramCall:
    masks = () if inputs.masks is None else (inputs.masks,)
    return ProgramCall(inputs.program, (inputs.packed, *masks))


def _describe(array: np.ndarray) -> tuple[str, tuple[int, ...]]:
    if array.dtype.name not in _DTYPES:
        raise TypeError(f"a step's arrays are of {sorted(_DTYPES)}, got {array.dtype.name}")
    return array.dtype.name, array.shape


def _digest(header: bytes, arrays: Sequence[bytes]) -> bytes:
    """The header says where one array ends and the next begins, so their bytes can run on."""
    digest = hashlib.blake2b(header, digest_size=DIGEST_BYTES)
    for array in arrays:
        digest.update(array)
    return digest.digest()
