"""Packed weights against the definitions of their formats, and operations on them against the same
operations on what they stand for: equal bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jengine.pallas_kernels.dispatch import differentiable
from jengine.pallas_kernels.grouped_matmul import cases
from jengine.pallas_kernels.grouped_matmul.api import expert_parts
from jengine.pallas_kernels.linear.api import linear, silu_linear
from jengine.pallas_kernels.linear_heads.api import linear_heads
from jengine.pallas_kernels.packed import (
    FP8_BLOCKS,
    FP8_FLOAT_BLOCKS,
    MXFP4,
    PackedWeight,
    Packing,
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
)
from jengine.pallas_kernels.packed_cases import defined_values, random_packed

PACKINGS = {"mxfp4": MXFP4, "fp8": FP8_BLOCKS, "fp8 with float scales": FP8_FLOAT_BLOCKS}
BYTES = np.arange(256, dtype=np.uint8)
every_packing = pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)


def test_every_code_is_what_its_format_says() -> None:
    nibbles = np.stack([BYTES & 15, BYTES >> 4], axis=-1).reshape(-1)
    exact = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    got = np.asarray(jax.jit(decode_e2m1)(BYTES))
    np.testing.assert_array_equal(got.view(np.uint32), exact.view(np.uint32))  # of zero, its sign
    exact = BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(decode_e4m3)(BYTES)), exact)
    exact = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(decode_e8m0)(BYTES))[:255], exact[:255])


@every_packing
@pytest.mark.parametrize("depth", [512, 96])
def test_a_packed_weight_is_its_values_rounded_once(packing: Packing, depth: int) -> None:
    weight = random_packed((3, 20, depth), packing)
    assert weight.shape == (3, 20, depth)
    exact = defined_values(weight)
    for dtype in ("float32", "bfloat16"):
        got = np.asarray(jax.jit(PackedWeight.unpacked, static_argnums=1)(weight, dtype))
        np.testing.assert_array_equal(got, exact.astype(dtype))
    if packing.scale_dtype == "uint8":  # nothing is lost in bfloat16
        np.testing.assert_array_equal(exact.astype("bfloat16").astype(np.float32), exact)


@every_packing
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_have_the_bits_of_unpacked_ones(packing: Packing, dtype: str) -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((5, 256), np.float32).astype(dtype))
    weight = random_packed((64, 256), packing)
    plain = jnp.asarray(defined_values(weight).astype(dtype))
    bias = jnp.asarray(rng.standard_normal(64, np.float32))
    num_tokens = jnp.int32(4)
    heads = x.reshape(5, 2, 128)
    narrow = random_packed((2, 48, 128), packing, seed=2)
    narrow_plain = jnp.asarray(defined_values(narrow).astype(dtype))
    for run, packed, unpacked in (
        (lambda w: linear(x, w, bias, num_tokens=num_tokens), weight, plain),
        (lambda w: linear(x, w, num_tokens=num_tokens, out_dtype="float32"), weight, plain),
        (lambda w: silu_linear(x, w, num_tokens=num_tokens), weight, plain),
        (lambda w: linear_heads(heads, w, num_tokens=num_tokens), narrow, narrow_plain),
    ):
        got, expected = (np.asarray(jax.jit(run)(w)) for w in (packed, unpacked))
        np.testing.assert_array_equal(got[..., :4, :], expected[..., :4, :])


@every_packing
def test_experts_have_the_bits_of_unpacked_ones(packing: Packing) -> None:
    case = cases.Case(9, 2, 5, embed=128, mlp=64)
    x, ids, weights, *_ = case.build()
    gate_up = random_packed((5, 128, 128), packing, 1, size=0.1)
    down = random_packed((5, 128, 64), packing, 2, size=0.1)

    def run(*experts: Any) -> np.ndarray:
        x_TD = jnp.asarray(x.astype("bfloat16"))
        return np.asarray(
            jax.jit(expert_parts)(x_TD, ids, weights, *experts, num_tokens=jnp.int32(8))
        )

    plain = [jnp.asarray(defined_values(w).astype("bfloat16")) for w in (gate_up, down)]
    got, expected = run(gate_up, down), run(*plain)
    np.testing.assert_array_equal(got[:, :8], expected[:, :8])


def test_no_more_than_one_expert_is_unpacked_at_a_time() -> None:
    """32 experts of 3 * 256 * 256 weights would be 25 MB in float32."""
    x, ids, weights, *_ = cases.Case(4, 2, 32, embed=256, mlp=256).build()
    gate_up, down = random_packed((32, 512, 256), MXFP4), random_packed((32, 256, 256), MXFP4)
    compiled = (
        jax.jit(expert_parts).lower(x, ids, weights, gate_up, down, num_tokens=jnp.int32(4))
    ).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 512 * 256 * 4


def test_gradients_go_through_to_activations() -> None:
    weight = random_packed((32, 128), MXFP4, size=0.1)
    x = np.random.default_rng(0).standard_normal((4, 128), np.float32)
    with differentiable():
        got = jax.grad(lambda x: (linear(x, weight) ** 2).sum())(x)
    values = defined_values(weight).astype(np.float64)
    expected = 2 * (x.astype(np.float64) @ values.T) @ values
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-4, atol=1e-4)


def test_codes_that_do_not_fill_their_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="33 codes of e2m1"):
        MXFP4.num_bytes(33)
    assert FP8_BLOCKS.num_bytes(33) == 33 and FP8_BLOCKS.num_groups(129) == 2
