"""Weights as checkpoints pack them: codes of four or eight bits, and a scale for each row and group
of inputs. A `PackedWeight` stands where an array [..., out, in] stood.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

SCALE_BIAS = 127  # of E8M0: a power of two, by its exponent
MIN_SCALE_BITS = 1 << 22  # 2^-127 as float32, which has no exponent for it


@dataclass(frozen=True, slots=True)
class Packing:
    """A format. Codes are bytes, of E2M1 two in each, the lower half first; a scale belongs to one
    row and `group` inputs, as a byte of E8M0 or in float32.
    """

    codes: Literal["e2m1", "e4m3"]
    group: int
    scale_dtype: Literal["uint8", "float32"] = "uint8"

    @property
    def codes_per_byte(self) -> int:
        return 2 if self.codes == "e2m1" else 1

    def num_bytes(self, depth: int) -> int:
        """Of the codes of one row. Raises `ValueError` if they end inside a byte."""
        if depth % self.codes_per_byte:
            raise ValueError(f"{depth} codes of {self.codes} do not fill their bytes")
        return depth // self.codes_per_byte

    def num_groups(self, depth: int) -> int:
        return -(-depth // self.group)


MXFP4 = Packing("e2m1", 32)  # OCP Microscaling formats 1.0
# DeepSeek's blocks of 128 x 128. Each row has the scale of its block, for 0.8% more bytes: then
# rows can be fused, permuted and shared out over ranks wherever a block ends.
FP8_BLOCKS = Packing("e4m3", 128)
FP8_FLOAT_BLOCKS = Packing("e4m3", 128, "float32")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """A weight [..., in], or several of one shape stacked."""

    codes: jax.Array  # u8[..., in / codes per byte]
    scales: jax.Array  # [..., groups of inputs]
    packing: Packing = field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        *rows, num_bytes = self.codes.shape
        return (*rows, num_bytes * self.packing.codes_per_byte)

    def unpacked(self, dtype: DTypeLike) -> jax.Array:
        """The weight, rounded once: where scales are powers of two, exact but in float16."""
        decode = decode_e2m1 if self.packing.codes == "e2m1" else decode_e4m3
        scales, depth = self.scales, self.shape[-1]
        if self.packing.scale_dtype == "uint8":
            scales = decode_e8m0(scales)
        scales = jnp.repeat(scales, self.packing.group, axis=-1)[..., :depth]
        return (decode(self.codes) * scales).astype(dtype)


Weight = jax.Array | PackedWeight  # [..., out, in]


def split_rows(weight: Weight, parts: int) -> Weight:
    """[parts, out / parts, in] of [out, in]."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[-1]), weight)


def unpacked_for(x: jax.Array, weight: PackedWeight) -> tuple[jax.Array, jax.Array]:
    """(`x`, the weight in the dtype of `x`), a temporary that is not made before there is an `x`:
    else XLA may unpack several layers' at once, or those of a loop before it.
    """
    x, codes, scales = lax.optimization_barrier((x, weight.codes, weight.scales))
    unpacked = PackedWeight(codes, scales, weight.packing).unpacked(x.dtype)
    return x, lax.optimization_barrier(unpacked)  # rounded, though XLA has more precision at hand


def kernel_arrays(weight: Weight) -> tuple[jax.Array, jax.Array]:
    """What kernels take for a weight: codes and scales, or an array twice."""
    if isinstance(weight, PackedWeight):
        return weight.codes, weight.scales
    return weight, weight


def kernel_codes(weight: Weight) -> str:
    """The constant that tells them what it is (`packed_kernels.py`): "" of an array."""
    return weight.packing.codes if isinstance(weight, PackedWeight) else ""


def decode_e2m1(codes: jax.Array) -> jax.Array:
    """f32[..., 2 n] of u8[..., n]. By integers: XLA:CPU flushes the subnormal numbers of float
    tricks, and its look-ups are slow."""
    nibbles = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    exponent, half = (nibbles >> 1) & 3, nibbles & 1
    is_normal = (exponent > 0).astype(jnp.uint8)
    doubled = ((is_normal << 1) + half) << (exponent - is_normal)  # twice 0, 0.5, 1, ... 6
    halved = doubled.astype(jnp.float32) * 0.5
    return jnp.where(nibbles >= 8, -halved, halved)


def decode_e4m3(codes: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def decode_e8m0(scales: jax.Array) -> jax.Array:
    bits = jnp.maximum(scales.astype(jnp.int32) << 23, MIN_SCALE_BITS)
    return lax.bitcast_convert_type(bits, jnp.float32)
