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
from triton.language.semantic import TritonSemantic
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
                results.append(_to_torch(np.full(out.shape, poison, out.dtype)))
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
_semantic: Any = TritonSemantic
_checked_dot_scaled = _semantic.dot_scaled


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


def _with_constant_formats(
    self: Any, a: Any, a_scale: Any, a_format: str, b: Any, b_scale: Any, b_format: str, *rest: Any
) -> Any:
    """Names of formats are expected as the compiler has them."""
    formats = tl.constexpr(a_format), tl.constexpr(b_format)
    return _checked_dot_scaled(self, a, a_scale, formats[0], b, b_scale, formats[1], *rest)


def _dot_scaled(
    self: Any, a: Any, scale: Any, kind: Any, b: Any, b_scale: Any, b_kind: Any, *rest: Any
) -> Any:
    """It has none. Codes of FP4 on the left, rounded to bfloat16 as on hardware without them."""
    _, a_packs_k, _, acc = rest
    assert a_packs_k and b_scale is None and b.dtype.scalar == tl.bfloat16
    nibbles = np.stack([a.data & 15, a.data >> 4], axis=-1).reshape(len(a.data), -1)
    values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    powers = np.ldexp(np.float32(1), scale.data.astype(np.int32) - 127)
    weights = (values * np.repeat(powers, 32, axis=1)).astype(ml_dtypes.bfloat16)
    handle = interpreter.TensorHandle(weights.view(np.uint16), tl.bfloat16)
    return _dot_bfloat16(self, handle, b, acc, None, 0)


interpreter._patch_lang_tensor = _patch_tensor_for_numpy_2_4
interpreter._convert_float = _convert_bfloat16
_builder.create_dot = _dot_bfloat16
_builder.create_dot_scaled = _dot_scaled
_semantic.dot_scaled = _with_constant_formats
