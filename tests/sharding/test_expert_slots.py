"""Experts in slots: loads are evened out, experts arrive where the table says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.config import EngineConfig, EplbConfig
from jengine.layers.expert_slots import choose_slots, count_slots
from jengine.request import Request, SamplingParams
from jengine.runtime.expert_slots import ExpertBalancer, move_experts
from jengine.runtime.programs import MOVE_EXPERTS
from jengine.sharding.expert_balance import (
    first_slots,
    imbalance,
    place_experts,
    plan_moves,
    rank_loads,
    slot_table,
)
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split
from tests.oracles.core_pump import CorePump
from tests.oracles.deepseek_v4 import GOLDEN
from tests.oracles.driver import Driver
from tests.sharding.parity import serve

TOLERANCE = 1e-5
SHAPES = ((384, 416, 32), (16, 20, 4), (6, 8, 8), (8, 8, 4), (4, 16, 4))  # experts, slots, ranks


def loads() -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(load of each expert, first slots, ranks): few experts draw most."""
    rng = np.random.default_rng(0)
    for num_experts, num_slots, num_ranks in SHAPES:
        first_P = first_slots(num_experts, num_slots, num_ranks)
        yield rng.pareto(1.2, num_experts), first_P, num_ranks


def test_the_busiest_rank_gets_less() -> None:
    for load_E, old_P, num_ranks in loads():
        new_P = place_experts(load_E, old_P, num_ranks)
        for slots_P in (old_P, new_P):
            replicas_E = np.bincount(slots_P, minlength=len(load_E))
            assert replicas_E.min() >= 1 and replicas_E.max() <= num_ranks
        before, after = (imbalance(rank_loads(load_E, s, num_ranks)) for s in (old_P, new_P))
        assert after <= before
        if len(load_E) == 384:
            assert before > 1.6 and after < 1.1
        np.testing.assert_array_equal(place_experts(load_E, new_P, num_ranks), new_P)


def test_an_even_load_moves_nobody() -> None:
    """Packing depends on the order of equal loads; slots are kept all the same."""
    for _, old_P, num_ranks in loads():
        load_E = np.ones(old_P.max() + 1)
        if len(load_E) == len(old_P):
            np.testing.assert_array_equal(place_experts(load_E, old_P, num_ranks), old_P)


def test_every_slot_is_in_the_table_once() -> None:
    for load_E, old_P, num_ranks in loads():
        slots_P = place_experts(load_E, old_P, num_ranks)
        table = slot_table(slots_P, len(load_E), num_ranks)
        listed = [slot for row in table for slot in row[1 : 1 + row[0]].tolist()]
        assert sorted(listed) == list(range(len(slots_P)))
        for expert, row in enumerate(table):
            assert set(slots_P[row[1 : 1 + row[0]]].tolist()) == {expert}


def test_tokens_share_replicas_and_choose_by_themselves() -> None:
    rng = np.random.default_rng(1)
    slots_P = np.array([0, 1, 2, 1, 0, 1])
    table = jnp.asarray(slot_table(slots_P, 3, 3))
    x_TD = jnp.asarray(rng.normal(size=(3000, 8)), jnp.bfloat16)
    ids_Tk = jnp.asarray(rng.permuted(np.tile(np.arange(3), (3000, 1)), axis=1)[:, :2], jnp.int32)
    chosen_Tk = choose_slots(ids_Tk, table, x_TD)
    np.testing.assert_array_equal(slots_P[np.asarray(chosen_Tk)], ids_Tk)
    backwards_Tk = choose_slots(ids_Tk[::-1], table, x_TD[::-1])
    np.testing.assert_array_equal(backwards_Tk[::-1], chosen_Tk)
    count_P = np.asarray(count_slots(chosen_Tk, jnp.int32(2900), 6).get_value())
    expected = np.bincount(np.asarray(chosen_Tk)[:2900].reshape(-1), minlength=6)
    np.testing.assert_array_equal(count_P, expected)
    share_P = count_P / np.bincount(np.asarray(ids_Tk)[:2900].reshape(-1))[slots_P]
    # Of about 2000 tokens: five standard deviations.
    np.testing.assert_allclose(share_P, 1 / np.bincount(slots_P)[slots_P], rtol=0, atol=0.056)


@pytest.mark.multi_device
def test_experts_move_to_their_new_slots() -> None:
    """Over data and expert ranks together: every slot holds what the plan says, bit for bit."""
    placement = Placement(Split(data=2, expert=2), tuple(jax.devices()[:4]))
    rng = np.random.default_rng(2)
    whole = {
        "weights": rng.normal(size=(6, 3, 2)).astype(np.float32),
        "bias": rng.integers(0, 99, (6, 5)).astype(np.int8),
    }
    whole["weights"][0] = -0.0
    whole["weights"][1] = np.nan
    old_P = first_slots(6, 8, 4)
    new_P = place_experts(rng.pareto(1.0, 6), old_P, 4)
    assert (old_P != new_P).sum() > 2
    weights = tuple(jax.device_put(w[old_P], placement.per_rank) for w in whole.values())
    table = slot_table(new_P, 6, 4)
    slots, sources, num_rounds = plan_moves(old_P, new_P, 4)
    arguments = (weights, slots, sources, np.int32(num_rounds), jnp.asarray(table))
    result = (weights, jax.device_put(table, placement.replicated))
    program = jax.jit(placement.on_ranks(move_experts, arguments, result))
    moved, new_table = program(*arguments)
    np.testing.assert_array_equal(new_table, table)
    for got, (name, expected) in zip(moved, whole.items(), strict=True):
        assert np.asarray(got).tobytes() == expected[new_P].tobytes(), name


def test_layers_are_decided_one_a_step() -> None:
    config = EplbConfig(window_size=2, step_interval=3)
    balancer = ExpertBalancer(config, (0, 1, 2, 3), 2, (4, 2), num_ranks=2)
    counts = np.zeros((1, 2, 4), np.int32)
    events: list[tuple[int, str | int]] = []
    step = 0

    def read() -> np.ndarray:
        events.append((step, "read"))
        return counts.copy()

    def move(layer: int, arrays: tuple[np.ndarray, ...]) -> None:
        assert arrays[2] == 1  # round
        events.append((step, layer))

    for step in range(8):
        balancer.before_step(read, move)
        counts[0, 0] += (9, 9, 1, 1)  # of the first layer; the second is even
        counts[0, 1] += (5, 5, 5, 5)
        if step == 0:
            counts[:] = np.iinfo(np.int32).max - 3  # wraps around inside the window
    assert events == [(1, "read"), (3, "read"), (4, 0), (7, "read")]
    busy, idle = {0, 1}, {2, 3}
    for experts in balancer.expert_of_slot[0].reshape(2, 2).tolist():
        assert len(busy.intersection(experts)) == len(idle.intersection(experts)) == 1
    assert balancer.num_moved == 1


def test_options_that_contradict_each_other_are_refused() -> None:
    ep2 = dict(tensor_parallel_size=2, enable_expert_parallel=True)
    config = EngineConfig.from_kwargs(
        "m", **ep2, enable_eplb=True, eplb_config={"step_interval": 5, "window_size": 5},
        num_redundant_experts=2,
    )  # fmt: skip
    assert config.parallel.eplb == EplbConfig(5, 5, 2)
    for options, message in (
        (dict(enable_eplb=True), "enable_eplb needs"),
        (dict(ep2, num_redundant_experts=2), "num_redundant_experts needs enable_eplb"),
        (dict(ep2, enable_eplb=True, eplb_config={"window_size": 5000}), r"window_size \(5000\)"),
        (dict(ep2, enable_eplb=True, num_redundant_experts=-1), "must be >= 0"),
        (dict(ep2, enable_eplb=True, batch_invariant=True), "promised with enable_eplb"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineConfig.from_kwargs("m", **options)
    with pytest.raises(TypeError, match="window"):
        EngineConfig.from_kwargs("m", **ep2, eplb_config={"window": 1})


SKEWED = dict(
    family="Mixtral", num_local_experts=16, num_experts_per_tok=2, intermediate_size=32,
    num_hidden_layers=2,
)  # fmt: skip
EP4: dict[str, Any] = dict(tensor_parallel_size=4, enable_expert_parallel=True)
EPLB: dict[str, Any] = dict(
    EP4, enable_eplb=True, num_redundant_experts=4,
    eplb_config=dict(window_size=60, step_interval=60),
)  # fmt: skip
STEPS: dict[str, Any] = dict(
    max_num_seqs=4, max_num_batched_tokens=64, prefill_buckets=(64,), decode_buckets=(4,),
    max_model_len=72, num_pages=64, page_size=16,
)  # fmt: skip


def skewed_model(folder: Path) -> None:
    """Mixtral whose router prefers the experts of the first rank, then those of the second: longer
    rows give larger scores.
    """
    from safetensors.numpy import load_file, save_file

    make_tiny_llama = pytest.importorskip("tests.oracles.tiny_llama").make_tiny_llama
    make_tiny_llama(folder, **SKEWED)
    order = list(dict.fromkeys(first_slots(16, 20, 4).tolist()))
    lengths = np.empty((16, 1), np.float32)
    lengths[order, 0] = np.geomspace(16.0, 0.5, 16)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name, weight in tensors.items():
        if name.endswith(".gate.weight"):
            weight *= lengths
    save_file(tensors, file, {"format": "pt"})


def run_prompts(driver: Driver, num_steps: int, seed: int) -> None:
    """As many steps of one prompt each."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(temperature=0, max_tokens=1)
    for i in range(num_steps):
        driver.run([Request(f"{seed}-{i}", rng.integers(3, 512, 64).tolist(), params)])


def measured_imbalance(driver: Driver, before: np.ndarray) -> list[float]:
    """Of each layer, from what ranks computed since `before`."""
    load = np.asarray(driver.runner.rows.slot_load).sum(axis=0) - before
    return [imbalance(layer.reshape(4, -1).sum(axis=1).astype(float)) for layer in load]


@pytest.mark.slow
@pytest.mark.multi_device
def test_a_skewed_router_is_evened_out(tmp_path: Path) -> None:
    """Four devices: the busiest gets over 1.6 times the average before, under 1.1 times after. The
    same executables, the same logits.
    """
    skewed_model(tmp_path)
    driver = Driver(tmp_path, **STEPS, **EPLB, enable_prefix_caching=False)
    runner = driver.runner
    balancer = runner.expert_balancer
    assert balancer is not None
    runner.programs[MOVE_EXPERTS]  # as an engine prepares it
    run_prompts(driver, 60, seed=1)
    before = np.asarray(runner.rows.slot_load).sum(axis=0)
    compiled = set(runner.programs.ready)
    uneven = measured_imbalance(driver, np.zeros_like(before))
    run_prompts(driver, 3, seed=2)  # the decision, and a move of each layer
    assert balancer.num_moved == 2
    before = np.asarray(runner.rows.slot_load).sum(axis=0)
    run_prompts(driver, 50, seed=3)
    even = measured_imbalance(driver, before)
    assert min(uneven) > 1.6 and max(even) < 1.1, (uneven, even)
    assert set(runner.programs.ready) == compiled
    tokens, logits = serve(driver)
    for options in ({}, EP4):
        other = Driver(tmp_path, **STEPS, **options)
        expected_tokens, expected = serve(other)
        assert tokens == expected_tokens
        assert np.abs(logits - expected).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_an_engine_moves_experts_while_it_serves(tmp_path: Path, load_format: str) -> None:
    """Data ranks, sampled several steps a dispatch where there is one rank of them, and a number of
    experts that does not divide: the tokens of one device.
    """
    make_tiny_llama = pytest.importorskip("tests.oracles.tiny_llama").make_tiny_llama
    make_tiny_llama(tmp_path, **dict(SKEWED, num_local_experts=6))
    balanced = dict(
        enable_expert_parallel=True, enable_eplb=True, num_redundant_experts=2,
        eplb_config=dict(window_size=2, step_interval=3),
    )  # fmt: skip
    expected = served_tokens(tmp_path, load_format=load_format)
    tp2_dp2 = dict(data_parallel_size=2, tensor_parallel_size=2)
    padded = dict(tp2_dp2, all2all_backend="padded_all_to_all")
    for ranks in (tp2_dp2, padded, dict(tensor_parallel_size=4)):
        got = served_tokens(tmp_path, load_format=load_format, **balanced, **ranks)
        assert got == expected


@pytest.mark.slow
@pytest.mark.multi_device
def test_deepseek_v4_shares_its_experts_out() -> None:
    """Over data ranks, each with all of attention and its streams; experts chosen by id, too."""
    options = dict(load_format="auto", page_size=128)
    expected = served_tokens(GOLDEN / "tinyA", **options)
    shared: dict[str, Any] = dict(options, data_parallel_size=4, enable_expert_parallel=True)
    balanced = dict(
        enable_eplb=True, num_redundant_experts=4, eplb_config=dict(window_size=2, step_interval=3)
    )
    for more in (dict(all2all_backend="padded_all_to_all"), balanced):
        assert served_tokens(GOLDEN / "tinyA", **shared, **more) == expected


def served_tokens(folder: Path, **options: Any) -> dict[str, list[int]]:
    pump = CorePump(
        folder, max_num_seqs=3, prefill_buckets=(32,), decode_buckets=(3,), max_decode_steps=4,
        **options,
    )  # fmt: skip
    rng = np.random.default_rng(5)
    for i in range(7):
        params = SamplingParams(temperature=0, max_tokens=9 + i, ignore_eos=True)
        pump.submit(f"r{i}", rng.integers(3, 96, 11 + 4 * i).tolist(), params)
    pump.drain()
    runner = pump.core.runner
    if runner.expert_balancer is not None:
        assert runner.expert_balancer.num_moved >= 2
        assert runner.programs.num_late == 0
    return pump.tokens()
