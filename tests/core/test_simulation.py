"""The simulated world: the engine's own schedulers on a virtual clock, the same every time."""

import pytest

from benchmarks.simulate.cost import H100, H200, Links, Work, World, v4_pro
from benchmarks.simulate.world import Simulation, Traffic, kv_pages

pytestmark = pytest.mark.slow  # 4 s


def test_sizes_are_those_of_the_model() -> None:
    model = v4_pro()
    experts = model.cfg.num_hidden_layers * model.cfg.moe.num_experts * model.expert_bytes
    assert experts == pytest.approx(822e9, rel=0.002)
    total = model.dense + model.embedding + experts / 4.25 * 8
    assert total == pytest.approx(1.57e12, rel=0.01)
    assert kv_pages(World(model, H200, Links(), 16), 256)[0] > 1000
    with pytest.raises(ValueError, match="KV cache"):
        kv_pages(World(model, H100, Links(), 16), 256)


def test_costs_follow_the_slowest_rank_and_the_bucket() -> None:
    world = World(v4_pro(), H200, Links(), 16)
    short, long = Work(8, [(1, 1000)] * 8), Work(8, [(1, 30_000)] * 8)
    assert world.seconds([short] * 16, 8) < world.seconds([short] * 15 + [long], 8)
    assert world.seconds([long] * 16, 8) == world.seconds([long] + [long] * 15, 8)
    assert world.seconds([short] * 16, 64) > world.seconds([short] * 16, 8)
    for rows in (8, 2048):
        costs = [
            World(v4_pro(), H200, Links(), n).exchange_seconds("gather", rows) for n in (8, 16, 64)
        ]
        assert costs == sorted(costs)


def test_a_world_serves_all_that_comes() -> None:
    world = World(v4_pro(), H200, Links(), 16)
    outcomes = [Simulation(world, 256, Traffic(3.0), seconds=60).run() for _ in range(2)]
    assert outcomes[0] == outcomes[1]
    outcome = outcomes[0]
    assert outcome.num_waiting <= 2 and outcome.num_preemptions == 0
    assert len(outcome.first_token) > 40
    # No token comes faster than a step of nothing else.
    fastest = world.seconds([Work(1, [(1, 1)])], 1)
    assert min(outcome.per_token) >= fastest and min(outcome.first_token) >= fastest
    # What was served is what arrived, but for what is under way at both ends.
    offered = sum(answer for at, _, answer in Traffic(3.0).arrivals(60, seed=1) if at > 15)
    assert outcome.num_tokens == pytest.approx(offered, rel=0.25)
