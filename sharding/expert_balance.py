"""Which slots hold which experts, so that all ranks get as much to do: as DeepSeek's EPLB
(github.com/deepseek-ai/EPLB) without its levels of hosts.

A slot is a place for one expert's weights; every rank has as many. There are at least as many slots
as experts: an expert in several slots has replicas, which share its tokens. `expert_of_slot`, of
all ranks one after another, says everything; the rest is derived from it.
"""

import heapq
from collections.abc import Sequence

import numpy as np

# A layer is left as it is unless its busiest rank would get less to do by this share: loads of two
# windows differ by some per cent anyway, and every move sends weights.
MIN_GAIN = 0.05


def first_slots(num_experts: int, num_slots: int, num_ranks: int) -> np.ndarray:
    """Before any load is known: i32[P], where each rank's experts ascend."""
    load_E = np.ones(num_experts)
    slots = place_experts(load_E, np.arange(num_slots) % num_experts, num_ranks)
    return np.sort(slots.reshape(num_ranks, -1), axis=1).reshape(-1)


def place_experts(load_E: np.ndarray, current_P: np.ndarray, num_ranks: int) -> np.ndarray:
    """i32[P]: the experts of each slot by the load of each expert. What may stay where it is in
    `current_P` does.
    """
    num_slots = len(current_P)
    replicas_E = _replicate(load_E, num_slots, num_ranks)
    ranks = _pack(load_E / replicas_E, replicas_E, num_ranks, num_slots // num_ranks)
    return _keep_places(ranks, current_P.reshape(num_ranks, -1))


def rank_loads(load_E: np.ndarray, slots_P: np.ndarray, num_ranks: int) -> np.ndarray:
    """f64[ranks], of experts whose replicas share evenly."""
    replicas_E = np.bincount(slots_P, minlength=len(load_E))
    return (load_E / replicas_E)[slots_P].reshape(num_ranks, -1).sum(axis=1)


def imbalance(loads_R: np.ndarray) -> float:
    """Load of the busiest rank over that of all on average; 1 if there is none."""
    mean = float(loads_R.mean())
    return float(loads_R.max()) / mean if mean else 1.0


def slot_table(slots_P: np.ndarray, num_experts: int, max_replicas: int) -> np.ndarray:
    """i32[E, 1 + R]: in how many slots an expert is, then in which (the rest is 0)."""
    table = np.zeros((num_experts, 1 + max_replicas), np.int32)
    for slot, expert in enumerate(slots_P.tolist()):
        table[expert, 0] += 1
        table[expert, table[expert, 0]] = slot
    return table


def plan_moves(
    old_P: np.ndarray, new_P: np.ndarray, num_ranks: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(slots i32[ranks, N], sources i32[ranks, N], rounds): in round i, rank r's own slot
    `slots[r, i]` (N: none) gets what slot `sources[r, i]` of all ranks held before the first.
    """
    size = len(old_P) // num_ranks
    slots = np.full((num_ranks, size), size, np.int32)
    sources = np.zeros((num_ranks, size), np.int32)
    num_rounds = 0
    for rank in range(num_ranks):
        moved = [p for p in range(rank * size, (rank + 1) * size) if old_P[p] != new_P[p]]
        for i, slot in enumerate(moved):
            found = np.flatnonzero(old_P == new_P[slot])
            own = found[found // size == rank]
            slots[rank, i] = slot - rank * size
            # From this rank, else receivers take turns among those that have it.
            sources[rank, i] = own[0] if len(own) else found[rank % len(found)]
        num_rounds = max(num_rounds, len(moved))
    return slots, sources, num_rounds


def _replicate(load_E: np.ndarray, num_slots: int, num_ranks: int) -> np.ndarray:
    """In how many slots each expert goes: one more for whoever has the most load in each of its
    own, until all slots are taken. More than one on a rank would share nothing.
    """
    replicas_E = np.ones(len(load_E), np.int64)
    heap = [(-load, expert) for expert, load in enumerate(load_E.tolist())]
    heapq.heapify(heap)
    for _ in range(num_slots - len(load_E)):
        _, expert = heapq.heappop(heap)
        replicas_E[expert] += 1
        if replicas_E[expert] < num_ranks:
            heapq.heappush(heap, (-load_E[expert] / replicas_E[expert], expert))
    return replicas_E


def _pack(load_E: np.ndarray, replicas_E: np.ndarray, num_ranks: int, size: int) -> list[list[int]]:
    """The experts of each rank: the largest first, each to the rank that has the least so far, has
    room, and has none of its replicas. (`load_E` is that of one replica.)
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for expert in np.argsort(-load_E, kind="stable").tolist():
        # All replicas at once, each to another rank.
        free = [r for r in range(num_ranks) if len(ranks[r]) < size]
        chosen = sorted(free, key=lambda r: (loads[r], len(ranks[r]), r))[: replicas_E[expert]]
        for rank in chosen:
            ranks[rank].append(expert)
            loads[rank] += float(load_E[expert])
        for _ in range(int(replicas_E[expert]) - len(chosen)):  # fewer ranks have room
            _place_twice(ranks, loads, expert, float(load_E[expert]), size)
    return ranks


def _place_twice(
    ranks: list[list[int]], loads: list[float], expert: int, load: float, size: int
) -> None:
    """A replica for which only ranks that have the expert have room: there, beside the other."""
    rank = min((r for r in range(len(ranks)) if len(ranks[r]) < size), key=lambda r: loads[r])
    ranks[rank].append(expert)
    loads[rank] += load


def _keep_places(new: Sequence[Sequence[int]], old_RN: np.ndarray) -> np.ndarray:
    """Name the ranks so that few experts move, and leave those that stay in their slots."""
    olds = [set(row) for row in old_RN.tolist()]
    common = sorted(
        (-len(olds[r].intersection(experts)), i, r)
        for i, experts in enumerate(new)
        for r in range(len(olds))
    )
    rank_of: dict[int, int] = {}
    for _, i, rank in common:
        if i not in rank_of and rank not in rank_of.values():
            rank_of[i] = rank
    slots_RN = np.full(old_RN.shape, -1, np.int32)
    for i, experts in enumerate(new):
        row, left = slots_RN[rank_of[i]], list(experts)
        for n, expert in enumerate(old_RN[rank_of[i]].tolist()):
            if expert in left:
                row[n] = expert
                left.remove(expert)
        row[row < 0] = sorted(left)
    return slots_RN.reshape(-1)
