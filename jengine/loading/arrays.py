"""Host arrays for parameters: dtypes by name, aligned memory, checked casts."""

import math

import ml_dtypes
import numpy as np

from jengine.errors import LoadError

ALIGNMENT = (
    64  # XLA:CPU takes a host array over without copying it when it starts at such an address
)

FLOAT_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# int32: of tables; uint8: of packed weights
DTYPES = {**FLOAT_DTYPES, "int32": np.dtype(np.int32), "uint8": np.dtype(np.uint8)}


def numpy_dtype(name: str) -> np.dtype:
    """The host dtype of a parameter."""
    if name not in DTYPES:
        raise LoadError(
            f"parameters of dtype {name!r} cannot be loaded; known: {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that starts at a multiple of `ALIGNMENT` bytes."""
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def cast_into(out: np.ndarray, value: np.ndarray, name: str) -> None:
    """Write `value` to `out`, rounding to nearest even. A finite number that float16 cannot hold is
    an error, and so are integers where weights belong, or the other way round: packed weights of
    a format that nobody has unpacked.
    """
    if (value.dtype.kind in "iu") != (out.dtype.kind in "iu"):
        raise LoadError(f"tensor {name!r} has dtype {value.dtype}, which is no {out.dtype}")
    with np.errstate(over="ignore"):
        out[...] = value
    # bfloat16 has float32's range, but weights beyond 65504 would become infinite in float16.
    may_overflow = out.dtype == np.float16 and value.dtype != np.float16
    if may_overflow and np.isfinite(value.astype(np.float32))[~np.isfinite(out)].any():
        raise LoadError(
            f"tensor {name!r} has values that float16 cannot hold; load with dtype bfloat16"
        )
