"""Packed weights for tests and benchmarks, and what they are by the definitions of the formats."""

import ml_dtypes
import numpy as np

from jengine.pallas_kernels.packed import SCALE_BIAS, PackedWeight, Packing

NAN_CODES = (0x7F, 0xFF)  # of e4m3


def random_packed(
    shape: tuple[int, ...], packing: Packing, seed: int = 0, size: float = 1.0
) -> PackedWeight:
    """Every code, over scales of three powers of two, or of any size about them. Host arrays; the
    weights are of about `size`.
    """
    rng = np.random.default_rng(seed)
    *rows, depth = shape
    codes = rng.integers(0, 256, (*rows, packing.num_bytes(depth)), np.uint8)
    if packing.codes == "e4m3":
        codes[np.isin(codes, NAN_CODES)] = 0x38
    exponent = np.round(np.log2(size / (3.0 if packing.codes == "e2m1" else 110.0)))
    exponents = exponent + rng.integers(-1, 2, (*rows, packing.num_groups(depth)))
    if packing.scale_dtype == "uint8":
        scales = (exponents + SCALE_BIAS).astype(np.uint8)
    else:
        scales = np.exp2(exponents).astype(np.float32)
        scales *= rng.uniform(1, 2, scales.shape).astype(np.float32)
    return PackedWeight(codes, scales, packing)  # pyright: ignore[reportArgumentType]


def defined_values(weight: PackedWeight) -> np.ndarray:
    """The weight in float32, by the codes' own dtypes."""
    codes, scales = np.asarray(weight.codes), np.asarray(weight.scales)
    if weight.packing.codes == "e2m1":
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(weight.shape)
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    else:
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    if weight.packing.scale_dtype == "uint8":
        scales = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return values * np.repeat(scales, weight.packing.group, axis=-1)[..., : weight.shape[-1]]
