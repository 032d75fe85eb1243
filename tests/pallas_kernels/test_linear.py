"""`linear` against float64, and the independence of a row's bits from its batch."""

from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jengine.pallas_kernels.linear import api
from jengine.pallas_kernels.linear.cases import CASES, Case
from jengine.pallas_kernels.packed import FP8_BLOCKS, FP8_FLOAT_BLOCKS, MXFP4, Packing, split_rows
from jengine.pallas_kernels.packed_cases import defined_values, random_packed

OPERATION = "linear"
EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}
# (rows, depth, outputs)
PRODUCTS = ((1, 1024, 96), (5, 576, 200), (16, 4096, 64), (40, 1536, 70), (64, 192, 130))
HEAD = ("linear", 65, 64, 49152)  # more rows than others
PACKED = (  # the same with packed weights; of heads, the outputs of each
    ("linear", 1, 1024, 96, FP8_BLOCKS),
    ("linear", 100, 384, 130, FP8_FLOAT_BLOCKS),
    ("linear", 5, 1024, 70, FP8_BLOCKS),
    ("linear", 40, 256, 64, MXFP4),
    ("silu_linear", 20, 384, 200, FP8_BLOCKS),
    ("linear_heads", 3, 128, 64, FP8_BLOCKS),
    ("linear_heads", 40, 1024, 128, MXFP4),
)
INTERPRETED = (
    *((kind, *p) for kind in ("linear", "silu_linear") for p in PRODUCTS),
    HEAD,
    *PACKED,
)
ON_DEVICE = (
    ("linear", 1, 4096, 1024, FP8_BLOCKS),
    ("linear", 128, 1024, 8192, FP8_BLOCKS),
    ("linear_heads", 64, 4096, 1024, FP8_BLOCKS),
    ("linear", 8, 2048, 4096, MXFP4),
)
ROW_COUNTS = (1, 2, 3, 4, 7, 8, 9, 13, 16, 31, 100)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(backend: ModuleType, case: Case) -> None:
    x, w, bias = case.build()
    x, w = x.astype(case.x_dtype), w.astype(case.w_dtype)
    out = jax.jit(backend.linear, static_argnames="out_dtype")(x, w, bias, out_dtype=case.out_dtype)
    expected = x.astype(np.float64) @ w.astype(np.float64).T + (0.0 if bias is None else bias)
    assert out.dtype == case.out_dtype
    tolerance = 4 * EPS["float32"] * case.depth + EPS[case.out_dtype] * np.abs(expected)
    assert np.all(np.abs(np.asarray(out, np.float64) - expected) <= tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("depth", "outputs"), [(576, 100), (1536, 64), (90, 33), (576, 1)])
def test_bits_of_a_row_do_not_depend_on_the_batch(
    backend: ModuleType, dtype: str, depth: int, outputs: int
) -> None:
    x, w, _ = Case(128, depth, outputs).build()
    x, w = x.astype(dtype), w.astype(dtype)
    call = jax.jit(backend.linear)
    whole = np.asarray(call(x, w))
    for rows in ROW_COUNTS:
        for first in (0, 128 - rows):
            part = np.asarray(call(x[first : first + rows], w))
            np.testing.assert_array_equal(
                part, whole[first : first + rows], err_msg=f"{rows} rows from {first}"
            )


def test_padding_rows_are_finite_and_touch_nothing(backend: ModuleType) -> None:
    x, w, bias = Case(24, 64, 40, has_bias=True).build()
    whole = np.asarray(backend.linear(x, w, bias))
    for num_tokens in (0, 1, 5, 20, 24):
        out = np.asarray(backend.linear(x, w, bias, num_tokens=jnp.int32(num_tokens)))
        np.testing.assert_array_equal(out[:num_tokens], whole[:num_tokens])
        assert np.isfinite(out).all()


def test_special_values(backend: ModuleType) -> None:
    x = np.zeros((3, 32), ml_dtypes.bfloat16)
    x[0, 3], x[1, 5] = np.nan, np.inf
    w = np.ones((20, 32), ml_dtypes.bfloat16)
    out = np.asarray(backend.linear(x, w), np.float32)
    assert np.isnan(out[0]).all()
    assert np.isposinf(out[1]).all()
    assert (out[2] == 0).all()


def test_other_dtypes_are_left_to_the_reference() -> None:
    from jengine.pallas_kernels.linear import cpu_ffi, linear

    x, w = jnp.ones((2, 8), jnp.float16), jnp.ones((4, 8), jnp.float16)
    with pytest.raises(NotImplementedError):
        cpu_ffi.linear(x, w)
    np.testing.assert_array_equal(np.asarray(linear(x, w)), 8.0)


@pytest.mark.parametrize("case", [c for c in INTERPRETED if c not in PACKED], ids=str)
def test_products_that_others_complete(case: tuple[str, int, int, int]) -> None:
    check(api, case)


def check_packed(backend: ModuleType, case: tuple[str, int, int, int, Packing]) -> None:
    """Every weight that a row of the unit matrix picks has the bits of its definition; sums are
    those of float64."""
    kind, rows, depth, outputs, packing = case
    heads = 3 if kind == "linear_heads" else 1
    size = (2 if kind == "silu_linear" else heads) * outputs
    weight = random_packed((size, depth), packing, size=depth**-0.5)
    values = defined_values(weight).astype(ml_dtypes.bfloat16).astype(np.float64)
    run = jax.jit(getattr(backend, kind))

    def product(x: np.ndarray) -> np.ndarray:
        given = weight if heads == 1 else split_rows(weight, heads)
        inputs = x if heads == 1 else x.reshape(len(x), heads, depth)
        return np.asarray(run(inputs, given, num_tokens=jnp.int32(len(x))), np.float64)

    rng = np.random.default_rng(3)
    x = rng.standard_normal((rows, heads * depth), np.float32).astype(ml_dtypes.bfloat16)
    noise = 4 * EPS["float32"] * depth**0.5
    out = product(x)
    if heads > 1:
        parts = [
            x[:, i * depth : (i + 1) * depth].astype(np.float64)
            @ values[i * outputs : (i + 1) * outputs].T
            for i in range(heads)
        ]
        expected = np.stack(parts, axis=1)
    else:
        expected = x.astype(np.float64) @ values.T
    if kind == "silu_linear":
        check_gated(out, expected, noise)
        return
    np.testing.assert_array_less(np.abs(out - expected), noise + EPS["bfloat16"] * np.abs(expected))
    for start in range(0, depth, rows):
        one_hot = np.zeros((rows, heads, depth), ml_dtypes.bfloat16)
        k = np.arange(start, min(start + rows, depth))
        one_hot[np.arange(len(k)), :, k] = 1
        picked = product(one_hot.reshape(rows, -1))
        np.testing.assert_array_equal(picked.reshape(rows, -1)[: len(k)], values[:, k].T)
        if start > 2 * 128:
            break


def check_gated(out: np.ndarray, product: np.ndarray, noise: float) -> None:
    gate, up = np.split(product, 2, axis=1)
    expected = gate / (1.0 + np.exp(-gate)) * up
    # The slope of silu is at most 1.1: half a unit of gate, of up, of the result.
    size = np.abs(1.1 * gate * up) + 2 * np.abs(expected)
    np.testing.assert_array_less(np.abs(out - expected), noise + EPS["bfloat16"] * size * 1.01)


def check(backend: ModuleType, case: tuple) -> None:
    """Gate and up are rounded before they are joined."""
    if len(case) == 5:
        from jengine.pallas_kernels.linear import packed_gpu

        check_packed(packed_gpu, case)
        return
    kind, rows, depth, outputs = case
    x, w, _ = Case(rows, depth, 2 * outputs if kind == "silu_linear" else outputs).build()
    x, w = x.astype(ml_dtypes.bfloat16), (w / depth**0.5).astype(ml_dtypes.bfloat16)
    run = getattr(backend, kind)
    if kind == "linear":
        run = partial(run, out_dtype="float32")
    out = np.asarray(jax.jit(run)(x, w), np.float64)
    product = x.astype(np.float64) @ w.astype(np.float64).T
    noise = 4 * EPS["float32"] * depth**0.5
    if kind == "linear":
        assert out.shape == product.shape
        np.testing.assert_allclose(out, product, rtol=0, atol=noise)
        return
    check_gated(out, product, noise)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, [1]), (1000, [1000]), (1024, [1024]), (1500, [2048]), (2048, [2048]),
        (3072, [2048, 1024]), (6144, [2048] * 3), (8192, [8192]), (9000, [8192, 1024]),
    ],
)  # fmt: skip
def test_many_rows_are_blocks_whose_sums_are_known(rows: int, sizes: list[int]) -> None:
    from jengine.pallas_kernels.linear.xla_gpu import row_blocks

    x = jnp.arange(rows, dtype=jnp.float32)[:, None]
    blocks = row_blocks(x)
    assert [len(block) for block in blocks] == sizes
    np.testing.assert_array_equal(np.concatenate(blocks)[:rows], x)
