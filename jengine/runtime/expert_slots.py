"""Routed experts in slots: counting what each gets, and moving them between steps. Nothing is
compiled for it: tables and weights are arguments of the same programs.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jengine.config import EplbConfig
from jengine.layers.expert_slots import SlotTable
from jengine.layers.param import ParamInfo
from jengine.sharding import collectives
from jengine.sharding.expert_balance import (
    MIN_GAIN,
    imbalance,
    place_experts,
    plan_moves,
    rank_loads,
    slot_table,
)

log = logging.getLogger(__name__)

Move = Callable[[int, tuple[np.ndarray, ...]], None]  # of a layer: arguments of `move_experts`


@dataclass(frozen=True)
class ExpertLayer:
    """Where a layer's experts are among the leaves of a runner."""

    weights: tuple[int, ...]
    table: int


def slot_tables(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of every table of slots of a module, in the order of layers."""
    state = nnx.to_flat_state(nnx.state(module, SlotTable))
    return {".".join(map(str, path)): leaf.get_value().shape for path, leaf in state}


def expert_layers(
    parameters: Mapping[str, ParamInfo], tables: Sequence[str]
) -> tuple[ExpertLayer, ...]:
    """Tables follow the parameters among the leaves."""
    stacked = [
        (i, path)
        for i, (path, info) in enumerate(parameters.items())
        if info.logical_axes[:1] == ("experts",)
    ]
    layers = []
    for i, table in enumerate(tables):
        inside = table.rpartition(".")[0] + "."
        weights = tuple(leaf for leaf, path in stacked if path.startswith(inside))
        layers.append(ExpertLayer(weights, len(parameters) + i))
    return tuple(layers)


def move_experts(
    weights: tuple[jax.Array, ...],
    slots_RN: jax.Array,
    sources_RN: jax.Array,
    num_rounds: jax.Array,
    table_ER: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(a layer's weights after the rounds of `plan_moves`, its table); runs on every rank.

    In each round a rank gets at most one expert, from any other. All send to all, since which of
    them has something for whom is data: the traffic is that of gathering, the memory that of two
    experts for each rank.
    """
    num_slots, rank = slots_RN.shape[1], collectives.rank_in("experts")

    def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        i, *moved = carry
        slots_R, sources_R = slots_RN[:, i], sources_RN[:, i]
        is_mine_R = sources_R // num_slots == rank
        local_R = jnp.where(is_mine_R, sources_R % num_slots, 0)
        for n, old in enumerate(weights):
            received = collectives.exchange_over(old[local_R], "experts")
            new = received[sources_R[rank] // num_slots]
            moved[n] = moved[n].at[slots_R[rank]].set(new, mode="drop")
        return i + 1, *moved

    _, *moved = jax.lax.while_loop(
        lambda carry: carry[0] < num_rounds, body, (jnp.int32(0), *weights)
    )
    return tuple(moved), table_ER


class ExpertBalancer:
    """Decides between steps which experts go where, one layer a step, from the load of the last
    window. `expert_of_slot` is i32[layers, P].
    """

    def __init__(
        self,
        config: EplbConfig,
        first_slots: Sequence[int],
        num_layers: int,
        table_shape: tuple[int, int],
        num_ranks: int,
    ) -> None:
        self._config = config
        self._num_ranks = num_ranks
        self._num_experts, self._max_replicas = table_shape[0], table_shape[1] - 1
        self.expert_of_slot = np.tile(np.asarray(first_slots, np.int32), (num_layers, 1))
        self._num_steps = 0  # since the last decision
        self._before: np.ndarray | None = None  # counts when the window began
        self._load_LE = np.zeros((num_layers, self._num_experts))
        self._next_layer = num_layers  # of those still to be decided
        self.num_moved = 0  # layers, ever

    def tables(self) -> list[np.ndarray]:
        """Of all layers."""
        return [self._table(layer) for layer in range(len(self.expert_of_slot))]

    def before_step(self, read: Callable[[], np.ndarray], move: Move) -> None:
        """`read` waits for the counts i32[data ranks, layers, P]: twice an interval."""
        if self._next_layer < len(self.expert_of_slot):
            self._decide(self._next_layer, move)
            self._next_layer += 1
            return  # steps count from when all is in its place
        if self._num_steps == self._config.step_interval:
            self._end_window(read())
            return
        if self._num_steps == self._config.step_interval - self._config.window_size:
            self._before = read()
        self._num_steps += 1

    def _end_window(self, counts: np.ndarray) -> None:
        assert self._before is not None
        # The counts wrap around; their difference does not.
        window = (counts.view(np.uint32) - self._before.view(np.uint32)).sum(axis=0, dtype=np.int64)
        for layer, slots_P in enumerate(self.expert_of_slot):
            self._load_LE[layer] = np.bincount(slots_P, window[layer], self._num_experts)
        if self._config.log_balancedness:
            loads = window.reshape(len(window), self._num_ranks, -1).sum(axis=2)
            log.info(
                "experts: the busiest rank had %.2f times the average load, mean of %d layers",
                np.mean([imbalance(each) for each in loads]),
                len(loads),
            )
        self._num_steps, self._next_layer = 0, 0

    def _decide(self, layer: int, move: Move) -> None:
        old_P, load_E = self.expert_of_slot[layer], self._load_LE[layer]
        new_P = place_experts(load_E, old_P, self._num_ranks)
        loads = [rank_loads(load_E, slots, self._num_ranks).max() for slots in (old_P, new_P)]
        if loads[1] > (1 - MIN_GAIN) * loads[0]:
            return
        slots, sources, num_rounds = plan_moves(old_P, new_P, self._num_ranks)
        self.expert_of_slot[layer] = new_P
        self.num_moved += 1
        move(layer, (slots, sources, np.asarray(num_rounds, np.int32), self._table(layer)))

    def _table(self, layer: int) -> np.ndarray:
        return slot_table(self.expert_of_slot[layer], self._num_experts, self._max_replicas)
