"""Dummy parameters depend on seed and path, and on nothing else; they are drawn in place."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest
import scipy.stats

from jengine.layers.param import Initializer, PackedParam, ParamInfo, abstract_parameters
from jengine.loading import dummy
from jengine.loading.dummy import compile_here, dummy_parameters, dummy_programs
from jengine.pallas_kernels.packed import FP8_BLOCKS, FP8_FLOAT_BLOCKS, MXFP4, PackedWeight
from jengine.pallas_kernels.packed_cases import defined_values
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split


def info(*shape: int, dtype: str = "float32", init: Initializer = "normal") -> ParamInfo:
    return ParamInfo(shape, dtype, (None,) * len(shape), init)


ABSTRACT = {
    "w": info(300, 200),
    "v": info(300, 200, dtype="bfloat16"),
    "norm": info(7, init="ones"),
    "bias": info(5, dtype="bfloat16", init="zeros"),
}


def placement() -> Placement:
    return Placement(Split(), (jax.devices()[0],))


def draw(abstract=ABSTRACT, seed: int = 0) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, dummy_parameters(abstract, seed, placement()))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A parameter of 300 rows takes 43 chunks of 7 rows, of which the last overlaps."""
    monkeypatch.setattr(dummy, "CHUNK_ELEMENTS", 7 * 200 + 1)
    dummy._jitted.cache_clear()
    yield
    dummy._jitted.cache_clear()


def test_distribution_and_dtypes() -> None:
    drawn = draw()
    for name in ("w", "v"):
        value = drawn[name].astype(np.float64)
        assert abs(value.mean()) < 4 * 0.02 / value.size**0.5
        assert value.std() == pytest.approx(0.02, rel=0.02)
    assert scipy.stats.kstest(drawn["w"].ravel() / 0.02, "norm").pvalue > 1e-3
    assert drawn["norm"].tolist() == [1] * 7
    assert drawn["bias"].astype(float).tolist() == [0] * 5
    assert {name: value.dtype.name for name, value in drawn.items()} == {
        name: entry.dtype for name, entry in ABSTRACT.items()
    }


def test_packed_weights_have_the_size_of_others() -> None:
    """No NaN among them, every code that may be, and neighbours with other scales."""
    for packing in (MXFP4, FP8_BLOCKS, FP8_FLOAT_BLOCKS):
        abstract = abstract_parameters(PackedParam((4, 64, 512), (None, None, None), packing))
        drawn = draw(dict(abstract))
        weight = PackedWeight(drawn["codes"], drawn["scales"], packing)  # pyright: ignore
        values = defined_values(weight)
        assert values.shape == (4, 64, 512)
        assert 0.015 < values.std() < 0.025 and abs(values.mean()) < 4 * 0.02 / values.size**0.5
        assert len(np.unique(drawn["codes"])) == (256 if packing is MXFP4 else 64)
        assert len(np.unique(drawn["scales"])) == 2
        assert drawn["scales"].dtype.name == packing.scale_dtype


def test_chunks_fill_every_row_with_other_numbers(small_chunks: None) -> None:
    value = draw()["w"]
    assert (value != 0).all()
    assert len(np.unique(value)) > 0.99 * value.size
    assert scipy.stats.kstest(value.ravel() / 0.02, "norm").pvalue > 1e-3


def test_a_parameter_depends_on_seed_and_path_only() -> None:
    drawn = draw()
    for other in (draw({"w": ABSTRACT["w"]}), draw(dict(reversed(ABSTRACT.items())))):
        np.testing.assert_array_equal(other["w"], drawn["w"])
    assert not np.array_equal(draw(seed=1)["w"], drawn["w"])
    assert not np.array_equal(draw({"x": ABSTRACT["w"]})["x"], drawn["w"])


def test_values_are_the_same_on_every_machine() -> None:
    """A change of this number changes every dummy model, so benchmarks no longer compare. Another
    back end's inverse error function may differ in the last bit.
    """
    first = draw({"layers.0.w": info(4)})["layers.0.w"]
    np.testing.assert_allclose(first, EXPECTED, rtol=1e-6)


EXPECTED = np.array([0.00021182228, 0.022561183, -0.027017845, -0.01236719], np.float32)


def test_one_program_for_each_distinct_parameter() -> None:
    names: list[str] = []

    def compile_(name, jitted, arguments):
        names.append(name)
        return compile_here(name, jitted, arguments)

    layers = {f"layers.{i}.w": info(64, 32) for i in range(5)}
    drawn = dummy_parameters(layers | ABSTRACT, 0, placement(), compile_)
    assert sorted(names) == [
        "normal-bfloat16-300x200", "normal-float32-300x200", "normal-float32-64x32",
        "ones-float32-7", "zeros-bfloat16-5",
    ]  # fmt: skip
    assert len({np.asarray(drawn[path]).tobytes() for path in layers}) == 5


def test_a_weight_has_no_float32_copy_of_itself() -> None:
    """[2F, D] of an 8B model is 224 MiB in bfloat16; its float32 normals alone would be 448."""
    sizes: list[tuple[int, int]] = []

    def compile_(name, jitted, arguments):
        memory = jitted.lower(*arguments).compile().memory_analysis()
        sizes.append((memory.temp_size_in_bytes, memory.output_size_in_bytes))
        return jitted

    dummy_programs({"w": info(28672, 4096, dtype="bfloat16")}, placement(), compile_)
    ((temporaries, outputs),) = sizes
    assert outputs == 28672 * 4096 * 2
    assert temporaries < outputs / 2


def test_progress_ends_with_all_bytes() -> None:
    seen: list[tuple[int, int]] = []
    dummy_parameters(
        ABSTRACT, 0, placement(), progress=lambda done, total: seen.append((done, total))
    )
    total = 300 * 200 * (4 + 2) + 7 * 4 + 5 * 2
    assert seen[-1] == (total, total)
    assert len(seen) == 4
