"""Tokens of data ranks and the experts of others: both exchanges give the right sums whatever the
load, and with the padded one a row's bits do not depend on the others.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx

from jengine.config import EngineConfig
from jengine.layers import moe as moe_layer
from jengine.layers.expert_exchange import Exchange, capacity, choose_exchange
from jengine.layers.moe import MoEConfig, SparseMLP
from jengine.layers.param import abstract_parameters
from jengine.sharding.cut import Pieces, cut_array
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split

pytestmark = pytest.mark.multi_device

E, K, D, F, T = 8, 2, 16, 8, 24
MOE = MoEConfig(E, K, F, norm_topk_prob=True)
BOTH: tuple[Exchange, ...] = ("allgather_reducescatter", "padded_all_to_all")
DATA4 = Split(data=4)
SPLITS = (DATA4, Split(data=2, expert=2), Split(data=2, tensor=2))


@functools.cache
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {path: info.shape for path, info in abstract_parameters(whole()).items()}
    return {path: rng.normal(size=s).astype(np.float32) / 3 for path, s in shapes.items()}


def whole() -> SparseMLP:
    return SparseMLP(D, MOE, "float32")


@functools.cache
def layer_on_ranks(split: Split, exchange: Exchange) -> Callable[..., np.ndarray]:
    """(rows of all data ranks one after another, real ones of each) -> the layer's result."""
    placement = Placement(split, tuple(jax.devices()[: split.num_ranks]))
    moe = dataclasses.replace(MOE.of_rank(split), exchange=exchange)
    module = SparseMLP(D, moe, "float32")
    local = abstract_parameters(module)

    def place(path: str) -> jax.Array:
        info = abstract_parameters(whole())[path]
        cut = cut_array(split, info.logical_axes, info.sections, local[path].sections)

        def read(pieces: Pieces) -> np.ndarray:
            return weights()[path][np.ix_(*(np.r_[along] for along in pieces))]

        return placement.place(cut, read)

    leaves = tuple(place(path) for path in local)
    graphdef, state = nnx.split(module)

    def layer(leaves: tuple[jax.Array, ...], x_TD: jax.Array, num_tokens: jax.Array) -> jax.Array:
        merged = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))
        return merged.parts(x_TD, num_tokens[0]).sum(axis=0)

    def arrays(x: np.ndarray, num_tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return tuple(jax.device_put(a, placement.per_data_rank) for a in (x, num_tokens))  # type: ignore[return-value]

    some = arrays(np.zeros((split.data * T, D), np.float32), np.zeros(split.data, np.int32))
    program = jax.jit(placement.on_ranks(layer, (leaves, *some), some[0]))
    return lambda x, num_tokens: np.asarray(program(leaves, *arrays(x, num_tokens)))


def expected(x_TD: np.ndarray) -> np.ndarray:
    """In float64, token by token."""
    w = {path: value.astype(np.float64) for path, value in weights().items()}
    out_TD = np.zeros(x_TD.shape)
    for t, x in enumerate(x_TD.astype(np.float64)):
        logits = w["gate.weight"] @ x
        chosen = np.argsort(-logits, kind="stable")[:K]
        share = np.exp(logits[chosen] - logits[chosen].max())
        for expert, weight in zip(chosen, share / share.sum(), strict=True):
            gate, up = np.split(w["experts.gate_up_proj"][expert] @ x, 2)
            product = gate / (1 + np.exp(-gate)) * up
            out_TD[t] += weight * (w["experts.down_proj"][expert] @ product)
    return out_TD


def rows(split: Split, *, one_expert: bool) -> np.ndarray:
    rng = np.random.default_rng(1)
    x_TD = rng.normal(size=(split.data * T, D)).astype(np.float32)
    if one_expert:  # of all tokens, the first choice
        x_TD += 4 * np.sign(weights()["gate.weight"][5])
    return x_TD


@pytest.mark.parametrize("one_expert", [False, True])
@pytest.mark.parametrize("exchange", BOTH)
@pytest.mark.parametrize("split", SPLITS, ids=["dp4", "dp2-ep2", "dp2-tp2"])
def test_both_give_the_right_sums(
    split: Split, exchange: Exchange, one_expert: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one round or in several, and with ranks that have few tokens or none."""
    monkeypatch.setattr(moe_layer, "capacity", lambda *sizes: 16)
    x_TD = rows(split, one_expert=one_expert)
    num_tokens = np.array([T, 0, 7, T - 1][: split.data], np.int32)
    got = layer_on_ranks(split, exchange)(x_TD, num_tokens).reshape(split.data, T, D)
    for rank, (n, result) in enumerate(zip(num_tokens, got, strict=True)):
        ours = x_TD.reshape(split.data, T, D)[rank, :n]
        np.testing.assert_allclose(result[:n], expected(ours), rtol=0, atol=1e-5)


def test_bits_of_a_row_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and among rows that need more rounds."""
    monkeypatch.setattr(moe_layer, "capacity", lambda *sizes: 16)
    layer = layer_on_ranks(DATA4, "padded_all_to_all")
    full = np.full(4, T, np.int32)
    some = rows(DATA4, one_expert=False)
    alone = layer(np.roll(some, -5, axis=0), np.array([1, 0, 0, 0], np.int32))[0]
    crowded = rows(DATA4, one_expert=True)
    crowded[20] = some[5]
    assert layer(some, full)[5].tobytes() == alone.tobytes()
    assert layer(crowded, full)[20].tobytes() == alone.tobytes()


def test_the_rule() -> None:
    """Many ranks, few experts a token and many tokens are for the padded one."""
    gather, padded = BOTH
    for num_tokens, top_k, num_ranks, chosen in (
        (8192, 8, 8, gather), (8192, 2, 8, padded), (8192, 8, 32, padded), (8192, 6, 32, padded),
        (128, 6, 32, padded), (8, 6, 32, gather), (1, 1, 64, gather), (8192, 8, 2, gather),
    ):  # fmt: skip
        assert choose_exchange("auto", num_tokens, top_k, num_ranks) == chosen
        assert choose_exchange(gather, num_tokens, top_k, num_ranks) == gather
        assert 1 <= capacity(num_tokens, top_k, num_ranks) <= num_tokens
    # One round does for an even router, nearly always.
    rng = np.random.default_rng(2)
    chosen = rng.random((128, 384)).argsort(axis=1)[:, :6] // 12
    most = max((chosen == rank).any(axis=1).sum() for rank in range(32))
    assert most <= capacity(128, 6, 32)


def test_unknown_exchanges_are_refused() -> None:
    with pytest.raises(ValueError, match="all2all_backend must be one of auto, "):
        EngineConfig.from_kwargs("m", all2all_backend="deepep")
