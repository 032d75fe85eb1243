"""Dummy parameters depend on the seed and the path, and on nothing else."""

import numpy as np
import pytest

from jengine.layers.param import Initializer, ParamInfo
from jengine.loading import dummy
from jengine.loading.dummy import dummy_parameters


def info(*shape: int, dtype: str = "float32", init: Initializer = "normal") -> ParamInfo:
    return ParamInfo(shape, dtype, (None,) * len(shape), init)


ABSTRACT = {
    "w": info(300, 200),
    "v": info(300, 200, dtype="bfloat16"),
    "norm": info(7, init="ones"),
    "bias": info(5, dtype="bfloat16", init="zeros"),
}


def draw(abstract=ABSTRACT, seed: int = 0) -> dict[str, np.ndarray]:
    return dummy_parameters(abstract, seed, lambda path, value: value)


def test_distribution_and_dtypes() -> None:
    drawn = draw()
    for name in ("w", "v"):
        value = drawn[name].astype(np.float32)
        assert abs(value.mean()) < 4 * 0.02 / value.size**0.5
        assert value.std() == pytest.approx(0.02, rel=0.02)
    assert drawn["norm"].tolist() == [1] * 7
    assert drawn["bias"].astype(float).tolist() == [0] * 5
    assert {name: value.dtype.name for name, value in drawn.items()} == {
        name: entry.dtype for name, entry in ABSTRACT.items()
    }


def test_a_parameter_depends_on_seed_and_path_only(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw()
    for other in (draw({"w": ABSTRACT["w"]}), draw(dict(reversed(ABSTRACT.items())))):
        np.testing.assert_array_equal(other["w"], drawn["w"])
    assert not np.array_equal(draw(seed=1)["w"], drawn["w"])
    assert not np.array_equal(draw({"x": ABSTRACT["w"]})["x"], drawn["w"])
    monkeypatch.setattr(dummy, "CHUNK_ELEMENTS", 999)
    np.testing.assert_array_equal(draw()["w"], drawn["w"])


def test_values_are_the_same_on_every_machine() -> None:
    """A change of this number changes every dummy model, so benchmarks no longer compare."""
    first = draw({"layers.0.w": info(4)})["layers.0.w"]
    np.testing.assert_array_equal(first, EXPECTED)


EXPECTED = np.array([-0.017347803, -0.025993425, -0.035522427, -0.03350134], np.float32)
