"""Random parameters, for work on speed and plumbing that needs a model's shapes but not its
weights. Drawn on the device: a host takes a minute for what a GPU does in a second.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jengine.layers.param import DUMMY_STD, ParamInfo
from jengine.loading.mxfp4 import SCALE_BIAS
from jengine.sharding.cut import Cut
from jengine.sharding.placement import Placement

# Numbers made at a time. They are written into the parameter's own buffer, so that a weight never
# has a float32 copy of itself.
CHUNK_ELEMENTS = 1 << 22
COMPILE_THREADS = 4
NO_CUTS: Mapping[str, Cut] = {}

Draw = Callable[[np.ndarray], jax.Array]  # key u32[2] -> parameter
Chunk = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]  # key, shape, dtype -> rows


class Compile(Protocol):
    """Finds or makes the executable of a jitted function of these abstract arguments."""

    def __call__(
        self, name: str, jitted: Any, arguments: Sequence[jax.ShapeDtypeStruct]
    ) -> Callable[..., jax.Array]: ...


def compile_here(
    name: str, jitted: Any, arguments: Sequence[jax.ShapeDtypeStruct]
) -> Callable[..., jax.Array]:
    """A `Compile` that keeps nothing on disk; jit itself keeps what it has compiled."""
    del name, arguments
    return jitted


def dummy_parameters(
    abstract: Mapping[str, ParamInfo],
    seed: int,
    placement: Placement,
    compile_: Compile = compile_here,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cuts: Mapping[str, Cut] = NO_CUTS,
) -> dict[str, jax.Array]:
    """normal(0, 0.02) weights, ones and zeros where declared; packed ones of about that size.

    A parameter depends on `seed` and its path only: not on the other parameters or their order,
    nor on how it is cut. The draws of another back end may differ in the last bit.
    """
    draws = dummy_programs(abstract, placement, compile_, cuts)
    total = sum(info.num_bytes for info in abstract.values())
    done = 0
    parameters = {}
    for path, info in abstract.items():
        draw = draws[program_name(info, cuts.get(path))]
        parameters[path] = draw(parameter_key(seed, path))
        done += info.num_bytes
        progress(done, total)
    return parameters


def dummy_programs(
    abstract: Mapping[str, ParamInfo],
    placement: Placement,
    compile_: Compile,
    cuts: Mapping[str, Cut] = NO_CUTS,
) -> dict[str, Draw]:
    """By name, one program for each distinct (shape, dtype, init) and way to cut it."""
    key = jax.ShapeDtypeStruct((2,), np.uint32, sharding=placement.replicated)
    distinct = {
        program_name(info, cut): (info, cut)
        for path, info in abstract.items()
        for cut in (cuts.get(path),)
    }

    def prepare(item: tuple[str, tuple[ParamInfo, Cut | None]]) -> Draw:
        name, (info, cut) = item
        return compile_(name, _jitted(info.shape, info.dtype, info.init, placement, cut), (key,))

    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        return dict(zip(distinct, pool.map(prepare, distinct.items()), strict=True))


def program_name(info: ParamInfo, cut: Cut | None = None) -> str:
    name = f"{info.init}-{info.dtype}-{'x'.join(map(str, info.shape))}"
    return name if cut is None else f"{name}-{hashlib.sha256(repr(cut).encode()).hexdigest()[:16]}"


def parameter_key(seed: int, path: str) -> np.ndarray:
    """Key data u32[2]. Made on the host: folding in a hash there costs no program."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return np.frombuffer(digest[:8], np.uint32)


@functools.cache
def _jitted(
    shape: tuple[int, ...], dtype: str, init: str, placement: Placement, cut: Cut | None
) -> Callable[[jax.Array], jax.Array]:
    def draw(key_data: jax.Array) -> jax.Array:
        if init in CHUNKS:
            return _in_chunks(CHUNKS[init], key_data, shape, jnp.dtype(dtype))
        if init == "columns":
            return jax.lax.broadcasted_iota(jnp.dtype(dtype), shape, len(shape) - 1)
        return jnp.full(shape, 1 if init == "ones" else 0, jnp.dtype(dtype))

    if cut is None:
        return jax.jit(draw, out_shardings=placement.replicated)
    # Every rank draws all of it and keeps its part: no rank waits for another.
    result = jax.ShapeDtypeStruct(cut.shape, jnp.dtype(dtype), sharding=placement.of(cut))
    return jax.jit(placement.on_ranks(lambda key: cut.part_of(draw(key)), (0,), result))


def _in_chunks(
    draw: Chunk, key_data: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
    key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
    num_rows, width = math.prod(shape[:-1]), shape[-1]
    chunk = min(max(1, CHUNK_ELEMENTS // width), num_rows)  # rows

    def write_chunk(i: jax.Array, rows: jax.Array) -> jax.Array:
        values = draw(jax.random.fold_in(key, i), (chunk, width), dtype)
        # The last chunk ends with the array and overlaps the one before.
        start = jnp.minimum(i * chunk, num_rows - chunk)
        return jax.lax.dynamic_update_slice(rows, values, (start, jnp.zeros_like(start)))

    zeros = jnp.zeros((num_rows, width), dtype)
    return jax.lax.fori_loop(0, -(-num_rows // chunk), write_chunk, zeros).reshape(shape)


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    values = jax.random.normal(key, shape, jnp.float32)
    return (values * jnp.float32(DUMMY_STD)).astype(dtype)


def _any_codes(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.bits(key, shape, dtype)


def _moderate_codes(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Any sign and fraction, exponents of 1/8 to 1: no NaN."""
    return jax.random.bits(key, shape, dtype) & 0x9F | 0x20


def _scales(exponent: int) -> Chunk:
    """Of this power of two or the next, so that no two groups need be alike."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        exponents = exponent + jax.random.bernoulli(key, 0.5, shape).astype(jnp.int32)
        if dtype == jnp.uint8:
            return (exponents + SCALE_BIAS).astype(dtype)
        return jnp.exp2(exponents.astype(dtype))

    return draw


CHUNKS: Mapping[str, Chunk] = {
    "normal": _normal,
    "e2m1": _any_codes,
    "e4m3": _moderate_codes,
    # With these, weights have about the size of normal ones: codes' is 2.93 and 0.84.
    "scales of e2m1": _scales(-8),
    "scales of e4m3": _scales(-6),
}
