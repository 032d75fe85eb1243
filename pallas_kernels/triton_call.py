"""Launches Triton kernels in a JAX program: Triton -> PTX while tracing, then XLA's PTX call.

The custom call `__gpu$xla.gpu.ptx` becomes a plain kernel launch in XLA's program: a kernel node of
the step's CUDA graph, with in-place aliasing and without a host call-back. This module hides what
depends on versions of Triton (3.6 and 3.7) and of XLA (the call's attributes); nobody else knows
either.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jengine.config import cache_root
from jengine.pallas_kernels.platform import compute_capability

TARGET = "__gpu$xla.gpu.ptx"
WARP = 32
POINTER_OF = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "int32": "*i32",
    "uint32": "*u32",
    "int8": "*i8",
    "uint8": "*u8",
}
ALIGNMENT = 16  # bytes; XLA aligns every buffer to more


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a kernel is compiled: warps of a program, and depth of its software pipeline."""

    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """What Triton made of a kernel: PTX, and how to launch it."""

    name: str
    ptx: str
    num_threads: int
    shared_bytes: int


Runner = Callable[..., list[jax.Array]]
_interpreter: Runner | None = None


@contextlib.contextmanager
def interpreted_by(runner: Runner) -> Iterator[None]:
    """Within the context `triton_call` goes to `runner` with the same arguments (tests: Triton's
    interpreter).
    """
    global _interpreter
    previous, _interpreter = _interpreter, runner
    try:
        yield
    finally:
        _interpreter = previous


def triton_call(
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    schedule: Schedule = Schedule(),
    aliases: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """Run `kernel(*inputs, *outputs, **constants)`, all arrays as pointers to dense row-major data.

    `grid` is static: let programs read their share of the work from memory. `aliases` maps an input
    to the output that takes its buffer over; under jit, donate it and rebind the result.
    """
    if _interpreter is not None:
        return _interpreter(kernel, inputs, outputs, grid, constants, dict(aliases or {}))
    major, minor = compute_capability()
    compiled = compile_kernel(
        kernel,
        tuple(POINTER_OF[x.dtype.name] for x in (*inputs, *outputs)),
        tuple(sorted(constants.items())),
        schedule,
        10 * major + minor,
    )
    first = len(inputs)
    spare = next(i for i in range(first) if i not in (aliases or {}))
    x, y, z = (*grid, 1, 1)[:3]
    call = jax.ffi.ffi_call(
        TARGET,
        list(outputs),
        input_output_aliases=dict(aliases or {}),
        custom_call_api_version=4,
    )
    # Triton's PTX takes two more pointers (scratch memory that our kernels do not use): any valid
    # operand does.
    results = call(
        *inputs,
        inputs[spare],
        inputs[spare],
        name=compiled.name,
        kernel_type="ptx",
        kernel_data=compiled.ptx,
        grid_x=np.int32(x),
        grid_y=np.int32(y),
        grid_z=np.int32(z),
        block_x=np.int32(compiled.num_threads),
        block_y=np.int32(1),
        block_z=np.int32(1),
        shared_mem_bytes=np.int32(compiled.shared_bytes),
        output_indices=tuple(range(first, first + len(outputs))),
    )
    return list(results)


@functools.cache
def compile_kernel(
    kernel: Any,
    pointers: tuple[str, ...],
    constants: tuple[tuple[str, Any], ...],
    schedule: Schedule,
    capability: int,
) -> CompiledKernel:
    """PTX of a kernel for one set of types and constants (a second or two; Triton keeps a cache on
    disk).

    Raises `RuntimeError` if it needs scratch memory, which nobody here would give it.
    """
    import triton
    from triton import knobs  # pyright: ignore[reportAttributeAccessIssue]
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    knobs.cache.dir = str(cache_root() / "triton")
    names, values = kernel.arg_names, dict(constants)
    if set(names[len(pointers) :]) != values.keys():
        raise TypeError(f"{kernel.__name__} takes {names}; got {len(pointers)} arrays, {values}")
    signature = dict(zip(names, pointers, strict=False)) | dict.fromkeys(values, "constexpr")
    with warnings.catch_warnings():
        # Triton 3.7 builds syntax trees in a way that Python 3.13 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = triton.compile(
            ASTSource(
                kernel,
                signature,
                constexprs=values,
                attrs={(i,): [["tt.divisibility", ALIGNMENT]] for i in range(len(pointers))},
            ),
            target=GPUTarget("cuda", capability, WARP),
            options={"num_warps": schedule.num_warps, "num_stages": schedule.num_stages},
        )
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise RuntimeError(f"{metadata.name} needs scratch memory in global memory")
    return CompiledKernel(
        name=metadata.name,
        ptx=compiled.asm["ptx"],
        num_threads=WARP * metadata.num_warps,
        shared_bytes=metadata.shared,
    )
