"""`expert_parts` against float64, its tiles, and the independence of bits from the batch."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels import native
from jengine.pallas_kernels.grouped_matmul import reference
from jengine.pallas_kernels.grouped_matmul.activation import ClampedSwiGLU
from jengine.pallas_kernels.grouped_matmul.cases import CASES, Case
from jengine.pallas_kernels.grouped_matmul.tiles import build_tiles, tile_rows
from jengine.pallas_kernels.linear import cpu_ffi
from jengine.pallas_kernels.linear import reference as linear_reference
from jengine.pallas_kernels.packed import FP8_BLOCKS, FP8_FLOAT_BLOCKS, MXFP4
from jengine.pallas_kernels.packed_cases import defined_values
from jengine.pallas_kernels.silu_mul import reference as silu_reference

CLAMPED = ClampedSwiGLU(alpha=1.7, limit=0.8)
CLAMPED_ONLY = ClampedSwiGLU(alpha=1.0, limit=0.5, up_offset=0.0)
# Widths that the Triton kernels take.
INTERPRETED = (
    Case(1, 8, 16, 128, 64),
    Case(5, 4, 4, 64, 128, "float32"),
    Case(40, 2, 64, 64, 64, touched=2),
    Case(70, 1, 3, 64, 64, "float32"),
    Case(64, 8, 32, 64, 192),
    Case(600, 2, 4, 64, 64),
    Case(1, 2, 6, 128, 64, packing=MXFP4),
    Case(33, 2, 5, 192, 64, packing=MXFP4),  # depths that end inside a tile
    Case(300, 2, 4, 256, 128, packing=MXFP4),
    Case(20, 2, 5, 256, 128, packing=FP8_BLOCKS),
    Case(3, 2, 5, 128, 128, packing=FP8_FLOAT_BLOCKS),
)
ON_DEVICE = (  # at widths of models
    Case(8, 6, 12, 2048, 1024, packing=MXFP4),
    Case(200, 4, 6, 2880, 576, packing=MXFP4),
    Case(700, 2, 4, 1024, 512, packing=MXFP4),
    Case(64, 4, 8, 1024, 512, packing=FP8_FLOAT_BLOCKS),
)
EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}


@pytest.fixture(params=["xla", "native"])
def expert_mlp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The loop over XLA's dots, and over the C++ `linear`."""
    if request.param == "xla":
        monkeypatch.setattr(reference, "linear", linear_reference.linear)
        monkeypatch.setattr(reference, "silu_mul", silu_reference.silu_mul)
    elif not native.is_available():
        pytest.skip(f"no C++ library: {native.status().reason}")
    else:
        monkeypatch.setattr(reference, "linear", cpu_ffi.linear)

    # A function object of its own: jit keeps traces by it, and the patches are not in its key.
    call = jax.jit(
        lambda *args, **options: reference.expert_parts(*args, **options)[0],
        static_argnames=("activation", "num_experts"),
    )

    def run(x, *args, num_tokens=None, **options):
        num_tokens = jnp.int32(len(x) if num_tokens is None else num_tokens)
        return np.asarray(call(x, *args, num_tokens=num_tokens, **options))

    return run


def arguments(case: Case, seed: int = 0) -> tuple[np.ndarray, ...]:
    x, ids, weights, gate_up, down = case.build(seed)
    return x.astype(case.dtype), ids, weights, gate_up.astype(case.dtype), down.astype(case.dtype)


def silu_product(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate / (1 + np.exp(-gate)) * up


def clamped_product(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate, up = np.minimum(gate, CLAMPED.limit), np.clip(up, -CLAMPED.limit, CLAMPED.limit)
    return gate / (1 + np.exp(-CLAMPED.alpha * gate)) * (up + 1)


def clamped_silu_product(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return silu_product(np.minimum(gate, 0.5), np.clip(up, -0.5, 0.5))


PRODUCTS = {None: silu_product, CLAMPED: clamped_product, CLAMPED_ONLY: clamped_silu_product}


def float64(
    x, ids, weights, gate_up, down, gate_up_bias=None, down_bias=None, product=silu_product
) -> np.ndarray:
    """Token by token, expert by expert."""
    x, weights, gate_up, down = (a.astype(np.float64) for a in (x, weights, gate_up, down))
    gate_up_bias = np.zeros(gate_up.shape[:2]) if gate_up_bias is None else gate_up_bias
    down_bias = np.zeros(down.shape[:2]) if down_bias is None else down_bias
    out = np.zeros(x.shape)
    for t in range(len(x)):
        for e, weight in zip(ids[t], weights[t], strict=True):
            gate, up = np.split(gate_up[e] @ x[t] + gate_up_bias[e], 2)
            out[t] += weight * (down[e] @ product(gate, up) + down_bias[e])
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(expert_mlp: Callable, case: Case) -> None:
    args = arguments(case)
    out = expert_mlp(*args)
    assert out.dtype == case.dtype
    # Gate, up and their product are of size one and rounded once each, the rest is float32.
    tolerance = 3 * EPS[case.dtype] * case.top_k**0.5 + 8 * EPS["float32"] * case.embed
    expected = float64(*args)
    assert np.abs(out.astype(np.float64) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("activation", PRODUCTS)
def test_biases_and_another_activation(
    expert_mlp: Callable, activation: ClampedSwiGLU | None
) -> None:
    case = Case(20, 3, 8, dtype="float32")
    args = arguments(case)
    rng = np.random.default_rng(5)
    gate_up_bias = rng.standard_normal((8, 2 * case.mlp), np.float32)
    down_bias = rng.standard_normal((8, case.embed), np.float32)
    out = expert_mlp(
        *args, gate_up_bias_EF=gate_up_bias, down_bias_ED=down_bias, activation=activation
    )
    product = PRODUCTS[activation]
    expected = float64(*args, gate_up_bias=gate_up_bias, down_bias=down_bias, product=product)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("top_k", [2, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 8))])
def test_bits_of_a_row_do_not_depend_on_the_batch(
    expert_mlp: Callable, dtype: str, top_k: int
) -> None:
    x, ids, weights, gate_up, down = arguments(Case(128, top_k, 16, 576, 192, dtype))
    whole = expert_mlp(x, ids, weights, gate_up, down)
    for rows in (1, 2, 3, 7, 16, 31, 100):
        for first in (0, 128 - rows):
            cut = slice(first, first + rows)
            part = expert_mlp(x[cut], ids[cut], weights[cut], gate_up, down)
            np.testing.assert_array_equal(part, whole[cut], err_msg=f"{rows} rows from {first}")
    order = np.random.default_rng(1).permutation(128)
    shuffled = expert_mlp(x[order], ids[order], weights[order], gate_up, down)
    np.testing.assert_array_equal(shuffled, whole[order])


def test_padding_rows_are_finite_and_touch_nothing(expert_mlp: Callable) -> None:
    x, ids, weights, gate_up, down = arguments(Case(24, 2, 4))
    whole = expert_mlp(x, ids, weights, gate_up, down)
    for num_tokens in (0, 1, 5, 23):
        unused = np.setdiff1d(np.arange(4), ids[:num_tokens])
        poisoned = gate_up.copy()
        poisoned[unused] = np.nan
        out = expert_mlp(x, ids, weights, poisoned, down, num_tokens=num_tokens)
        np.testing.assert_array_equal(out[:num_tokens], whole[:num_tokens])
        assert np.isfinite(out.astype(np.float32)).all()


def test_a_row_that_is_not_finite_stays_alone(expert_mlp: Callable) -> None:
    x, ids, weights, gate_up, down = arguments(Case(9, 2, 4, dtype="float32"))
    whole = expert_mlp(x, ids, weights, gate_up, down)
    x[4] = np.nan
    out = expert_mlp(x, ids, weights, gate_up, down, num_tokens=8)
    others = [0, 1, 2, 3, 5, 6, 7]
    np.testing.assert_array_equal(out[others], whole[others])
    assert np.isnan(out[4]).all() and np.isfinite(out[8]).all()


def test_the_experts_of_ranks_add_up(expert_mlp: Callable) -> None:
    """Each rank touches its own experts only, and the tiles of no others."""
    case = Case(24, 3, 12, dtype="float32")
    x, ids, weights, gate_up, down = arguments(case)
    ids[:5] = [4, 5, 7]  # nothing for the first and the last rank
    total = np.zeros(x.shape, np.float32)
    for first in (0, 4, 8):
        ours = ids - first
        ours = np.where((ours >= 0) & (ours < 4), ours, 4)
        rank = slice(first, first + 4)
        share = expert_mlp(
            x, ours, weights, gate_up[rank], down[rank], num_tokens=20, num_experts=12
        )
        assert np.abs(share[:5]).max() == 0 or first == 4
        tiles = build_tiles(jnp.asarray(ours), 4, tile_rows(24, 3, 12), jnp.int32(5))
        assert int(tiles.num_tiles) == (3 if first == 4 else 0)
        total += share
    expected = float64(x, ids, weights, gate_up, down)[:20]
    np.testing.assert_allclose(total[:20], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_cover_every_pair_once(case: Case, rows: int) -> None:
    _, ids, *_ = case.build()
    build = jax.jit(build_tiles, static_argnums=(1, 2))
    for num_tokens in {case.tokens, case.tokens // 2, 0}:
        tiles = jax.tree.map(
            np.asarray, build(jnp.asarray(ids), case.experts, rows, jnp.int32(num_tokens))
        )
        used = int(tiles.num_tiles)
        assert used <= len(tiles.expert_G)
        tables = zip(tiles.expert_G, tiles.start_G, tiles.stop_G, strict=True)
        pairs, end = [], 0
        for expert, start, stop in list(tables)[:used]:
            assert start == end and 0 < stop - start <= rows
            pairs += [(int(expert), int(tiles.token_M[m])) for m in range(start, stop)]
            end = stop
        assert pairs == sorted((e, t) for t in range(num_tokens) for e in ids[t].tolist())
        assert all(
            pairs[tiles.rank_Tk[t, j]] == (ids[t, j], t)
            for t in range(num_tokens)
            for j in range(case.top_k)
        )


def test_the_loop_runs_once_for_each_expert_touched() -> None:
    """At few tokens a tile holds all that an expert gets."""
    for touched in (2, 3, 9, 16):
        _, ids, *_ = Case(8, 2, 16, touched=touched).build()
        tiles = build_tiles(jnp.asarray(ids), 16, tile_rows(8, 2, 16), jnp.int32(8))
        assert int(tiles.num_tiles) == len(np.unique(ids))


def check(backend: ModuleType, case: Case) -> None:
    """The back end's own, with padding, an untouched expert of NaN, and what gpt-oss and
    DeepSeek-V4 have instead of SwiGLU."""
    x, ids, weights, gate_up, down = arguments(case)
    num_tokens = case.tokens - case.tokens // 3
    rng = np.random.default_rng(5)
    biases = (
        rng.standard_normal(gate_up.shape[:2], np.float32).astype(case.dtype),
        rng.standard_normal(down.shape[:2], np.float32).astype(case.dtype),
    )
    untouched = np.setdiff1d(np.arange(case.experts), ids[:num_tokens])
    if case.packing is None:
        poisoned, given_down = gate_up.copy(), down
        poisoned[untouched] = np.nan
    else:
        poisoned, given_down = case.build_packed()
        # What kernels multiply by is the bfloat16 nearest to a weight.
        gate_up, down = (defined_values(w).astype(case.dtype) for w in (poisoned, given_down))
        poisoned.scales[untouched] = 255 if case.packing.scale_dtype == "uint8" else np.nan
    call = jax.jit(backend.expert_parts, static_argnames=("activation", "num_experts"))
    for activation, bias in ((None, (None, None)), (CLAMPED, biases), (CLAMPED_ONLY, biases)):
        parts = call(
            x, ids, weights, poisoned, given_down, num_tokens=jnp.int32(num_tokens),
            gate_up_bias_EF=bias[0], down_bias_ED=bias[1], activation=activation,
        )  # fmt: skip
        out = np.asarray(parts).astype(np.float64).sum(0)[:num_tokens]
        expected = float64(
            x, ids, weights, gate_up, down, *bias,
            product=PRODUCTS[activation],
        )[:num_tokens]  # fmt: skip
        # As above; one rounding more where summands are rounded.
        tolerance = 4 * EPS[case.dtype] * case.top_k**0.5 + 8 * EPS["float32"] * case.embed
        error = np.abs(out - expected).max()
        assert error <= tolerance * np.abs(expected).max(), (activation, error)
    if case.experts > 1:
        args = (x, ids, weights, gate_up, down)
        check_share(call, case, args, (poisoned, given_down), num_tokens)


def check_share(call: Callable, case: Case, args: tuple, given: tuple, num_tokens: int) -> None:
    """The first half of the experts, of which other ranks hold the rest."""
    x, ids, weights, gate_up, down = args
    half = case.experts // 2
    ours = np.where(ids < half, ids, half).astype(np.int32)
    first_half = jax.tree.map(lambda x: x[:half], given)
    parts = call(
        x, ours, weights, *first_half, num_tokens=jnp.int32(num_tokens),
        num_experts=case.experts,
    )  # fmt: skip
    out = np.asarray(parts).astype(np.float64).sum(0)[:num_tokens]
    rest = np.where(ids < half, weights, 0)
    expected = float64(x, ids, rest, gate_up, down)[:num_tokens]
    tolerance = 4 * EPS[case.dtype] * case.top_k**0.5 + 8 * EPS["float32"] * case.embed
    assert np.abs(out - expected).max() <= tolerance * max(np.abs(expected).max(), 1.0)
