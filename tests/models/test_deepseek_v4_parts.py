"""Parts of DeepSeek-V4 against float64, and what must hold of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.layers.rope import RopeTable, rope_cos_sin
from jengine.models.deepseek_v4.config import HyperConfig
from jengine.models.deepseek_v4.hyper_connections import Mixing
from jengine.models.deepseek_v4.rotary import inverse, rotate_tail
from jengine.pallas_kernels.read_streams.reference import sinkhorn

ROPE = RopeTable(tuple(float(x) for x in 10000.0 ** -(np.arange(4) / 4)))


def sinkhorn_float64(numbers: np.ndarray, rounds: int, eps: float) -> np.ndarray:
    powers = np.exp(numbers - numbers.max(axis=-1, keepdims=True))
    m = powers / powers.sum(axis=-1, keepdims=True) + eps
    m /= m.sum(axis=-2, keepdims=True) + eps
    for _ in range(rounds - 1):
        m /= m.sum(axis=-1, keepdims=True) + eps
        m /= m.sum(axis=-2, keepdims=True) + eps
    return m


@pytest.mark.parametrize("hyper", [HyperConfig(), HyperConfig(3, 1, 1e-3)], ids=str)
def test_sinkhorn_equals_float64(hyper: HyperConfig) -> None:
    c = hyper.num_streams
    numbers = 2 * np.random.default_rng(0).standard_normal((33, c, c), np.float32)
    mixed = jax.jit(lambda x: sinkhorn(x, hyper.sinkhorn_iters, hyper.eps))
    out = np.asarray(mixed(numbers))
    expected = sinkhorn_float64(numbers.astype(np.float64), hyper.sinkhorn_iters, hyper.eps)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    if hyper.sinkhorn_iters == 20:
        np.testing.assert_allclose(out.sum(axis=1), 1, atol=1e-5)  # columns: new streams
    for rows in (1, 2, 8, 31):  # whoever is beside a token
        np.testing.assert_array_equal(np.asarray(mixed(numbers[1 : 1 + rows])), out[1 : 1 + rows])


def test_old_streams_come_first_in_the_mixing() -> None:
    rng = np.random.default_rng(0)
    y, post, mix, streams = (
        rng.standard_normal(shape, np.float32) for shape in ((5, 7), (5, 4), (5, 4, 4), (5, 4, 7))
    )
    out = Mixing(jnp.asarray(post), jnp.asarray(mix)).join(jnp.asarray(y), jnp.asarray(streams))
    expected = np.einsum("tj,td->tjd", post, y) + np.einsum("tij,tid->tjd", mix, streams)
    np.testing.assert_allclose(np.asarray(out), expected, atol=1e-5)


def rotation(positions: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return rope_cos_sin(ROPE, jnp.asarray(positions, jnp.int32))


def test_pairs_side_by_side_at_the_end_rotate_and_rotate_back() -> None:
    x = np.random.default_rng(0).standard_normal((6, 2, 11), np.float32)
    positions = np.array([0, 1, 2, 17, 100, 4000])
    out = np.asarray(rotate_tail(jnp.asarray(x), rotation(positions)))
    np.testing.assert_array_equal(out[..., :3], x[..., :3])
    angles = positions[:, None, None] * np.array(ROPE.inv_freq)
    turned = (x[..., 3::2] + 1j * x[..., 4::2]) * np.exp(1j * angles)
    np.testing.assert_allclose(out[..., 3::2], turned.real, atol=1e-3)  # angles are float32
    np.testing.assert_allclose(out[..., 4::2], turned.imag, atol=1e-3)
    back = rotate_tail(jnp.asarray(out), inverse(rotation(positions)))
    np.testing.assert_allclose(np.asarray(back), x, atol=1e-5)


def test_what_attention_finds_depends_on_distances_only() -> None:
    """Vectors that are key and value, and are rotated back by the query's position."""
    rng = np.random.default_rng(0)
    q, vectors = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((1, 2, 11), (9, 1, 11)))

    def attend(shift: int) -> np.ndarray:
        rotated = rotate_tail(vectors, rotation(np.arange(9) + shift))[:, 0]
        query = rotate_tail(q, rotation(np.array([8 + shift])))
        weights = jax.nn.softmax(query[0] @ rotated.T, axis=-1)
        return np.asarray(
            rotate_tail((weights @ rotated)[None], inverse(rotation(np.array([8 + shift]))))
        )

    np.testing.assert_allclose(attend(300), attend(0), atol=2e-4)
    np.testing.assert_allclose(attend(3), attend(0), atol=1e-5)
