"""Runs our Triton kernels on a CPU, in Triton's own interpreter, where tests run them on small
cases.

The interpreter is chosen when a kernel is decorated, so this module must be imported before any
module with kernels: tests do it in a process of their own (`tests/pallas_kernels/interpreted.py`).
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def run_interpreted(
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    aliases: Mapping[int, int],
) -> list[jax.Array]:
    """A runner for `triton_call.interpreted_by`. Outputs start poisoned: NaN, or -77."""
    input_of = {output: i for i, output in aliases.items()}

    def host(*arrays: np.ndarray) -> list[np.ndarray]:
        tensors = [_to_torch(np.asarray(a)) for a in arrays]
        results = []
        for j, out in enumerate(outputs):
            if j in input_of:
                results.append(tensors[input_of[j]])
            else:
                poison = np.nan if jnp.issubdtype(out.dtype, jnp.floating) else -77
                results.append(_to_torch(np.full(out.shape, poison).astype(out.dtype)))
        kernel[grid](*tensors, *results, **constants)
        return [_to_numpy(t, out.dtype) for t, out in zip(results, outputs, strict=True)]

    return jax.pure_callback(host, list(outputs), *inputs)


def _to_torch(x: np.ndarray) -> torch.Tensor:
    x = np.array(x, order="C")  # a copy: kernels write into it
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _to_numpy(x: torch.Tensor, dtype: Any) -> np.ndarray:
    if dtype == jnp.bfloat16:
        return x.view(torch.int16).numpy().view(jnp.bfloat16)
    return x.numpy()


# --- what the interpreter of Triton 3.6 and 3.7 gets wrong

_patch_tensor = interpreter._patch_lang_tensor
_convert = interpreter._convert_float
_builder: Any = interpreter.InterpreterBuilder
_dot = _builder.create_dot
_multiply = _builder.create_fmul


def _patch_tensor_for_numpy_2_4(tensor: Any, scope: Any) -> None:
    """A run-time loop bound is an array of one element, which `int` no longer takes."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert_bfloat16(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """It truncates; the hardware rounds to nearest even."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return x.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    if (source, target) == (tl.bfloat16, tl.float32):
        return x.view(ml_dtypes.bfloat16).astype(np.float32).view(np.uint32)
    return _convert(x, source, target, rounding)


def _dot_bfloat16(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    """It multiplies the bit patterns of bfloat16."""
    wide = [
        interpreter.TensorHandle(x.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)
        if x.dtype.scalar == tl.bfloat16
        else x
        for x in (a, b)
    ]
    return _dot(self, *wide, d, *rest)


def _multiply_bfloat16(self: Any, a: Any, b: Any) -> Any:
    """And here."""
    if a.dtype.scalar != tl.bfloat16:
        return _multiply(self, a, b)
    product = (_as_float64(a.data) * _as_float64(b.data)).astype(ml_dtypes.bfloat16)
    return interpreter.TensorHandle(product.view(np.uint16), tl.bfloat16)


def _bfloat16(self: Any, value: float) -> Any:
    """It has no such constants."""
    data = np.array([value], ml_dtypes.bfloat16).view(np.uint16)
    return interpreter.TensorHandle(data, tl.bfloat16)


def _as_float64(bits: np.ndarray) -> np.ndarray:
    """Of bfloat16, without a float on the way: XLA's threads flush subnormal ones, as the hardware
    does not."""
    exponent, fraction = (bits >> 7).astype(np.int32) & 0xFF, (bits & 0x7F).astype(np.float64)
    fraction = np.where(exponent > 0, fraction + 128, fraction)
    size = np.ldexp(fraction, np.maximum(exponent, 1) - 134)
    size = np.where(exponent == 255, np.where(fraction > 128, np.nan, np.inf), size)
    return np.where(bits >> 15, -size, size)


interpreter._patch_lang_tensor = _patch_tensor_for_numpy_2_4
interpreter._convert_float = _convert_bfloat16
_builder.create_dot = _dot_bfloat16
_builder.create_fmul = _multiply_bfloat16
_builder.get_bf16 = _bfloat16
