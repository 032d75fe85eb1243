"""Steps as frames of bytes and back: a header, a digest over all the rest, and each array's bytes.

Pure. A follower believes nothing before the digest is right: then the frames are as the leader made
them, and what is still wrong (order, epoch, key) is wrong about the gang.
"""

import hashlib
from collections.abc import Mapping, Sequence

import ml_dtypes  # noqa: F401 (NumPy learns its dtypes)
import msgspec
import numpy as np

from jengine.distributed.protocol import GangError, ProgramCall
from jengine.errors import ExitCode

DIGEST_BYTES = 16
NUM_LEADING = 2  # frames before the arrays: header, digest
# Hidden states are in the model's dtype, which NumPy knows once `ml_dtypes` is there.
_DTYPES = frozenset({"int32", "uint32", "float32", "bool", "bfloat16", "float16"})


class CallHeader(msgspec.Struct, array_like=True):
    program: str
    key: str  # of its executable: the same name must mean the same program everywhere
    arrays: list[tuple[str, tuple[int, ...]]]  # dtype, shape


class StepHeader(msgspec.Struct, array_like=True):
    """Without a call: the leader has ended in good order."""

    epoch: int
    number: int  # 1, 2, 3, ... without a gap
    call: CallHeader | None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StepHeader)


def encode_step(
    epoch: int, number: int, call: ProgramCall | None, keys: Mapping[str, str]
) -> list[bytes]:
    """Frames of a step, or of the end. `keys` names the executable of each program; KeyError if one
    is missing.
    """
    if call is None:
        header, arrays = _encoder.encode(StepHeader(epoch, number, None)), []
    else:
        described = [_describe(array) for array in call.arrays]
        of_call = CallHeader(call.program, keys[call.program], described)
        header = _encoder.encode(StepHeader(epoch, number, of_call))
        arrays = [array.tobytes() for array in call.arrays]
    return [header, _digest(header, arrays), *arrays]


def decode_step(frames: Sequence[bytes]) -> tuple[StepHeader, ProgramCall | None]:
    """Raises `GangError` if these are not the frames that the leader made. Arrays are views of the
    frames: no copy, read-only.
    """
    if len(frames) < NUM_LEADING or frames[1] != _digest(frames[0], frames[NUM_LEADING:]):
        raise GangError("a step's digest is wrong: its bytes changed on the way")
    try:
        header = _decoder.decode(frames[0])
    except msgspec.DecodeError as error:
        raise GangError(f"a step's header is unreadable: {error}", ExitCode.CONFIG) from None
    if (call := header.call) is None:
        return header, None
    arrays = tuple(
        np.frombuffer(frame, dtype).reshape(shape)
        for frame, (dtype, shape) in zip(frames[NUM_LEADING:], call.arrays, strict=True)
    )
    return header, ProgramCall(call.program, arrays)


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
