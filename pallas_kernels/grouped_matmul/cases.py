"""Cases of `expert_parts` for tests and benchmarks: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np

from jengine.pallas_kernels.packed import PackedWeight, Packing
from jengine.pallas_kernels.packed_cases import random_packed


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes and dtype of one call. `touched`: experts that tokens may be routed to, from the last
    one downwards; all by default. `packing`: of weights that `build_packed` makes.
    """

    tokens: int
    top_k: int
    experts: int
    embed: int = 64
    mlp: int = 96
    dtype: str = "bfloat16"
    touched: int | None = None
    packing: Packing | None = None

    def build(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """x, expert ids, their weights, gate_up and down; floats in float32 and near size one."""
        rng = np.random.default_rng(seed)
        E, D, F = self.experts, self.embed, self.mlp
        x = rng.standard_normal((self.tokens, D), np.float32)
        gate_up = rng.standard_normal((E, 2 * F, D), np.float32) / np.float32(D**0.5)
        down = rng.standard_normal((E, D, F), np.float32) / np.float32(F**0.5)
        first = E - (self.touched or E)
        ids = [first + rng.permutation(E - first)[: self.top_k] for _ in range(self.tokens)]
        weights = rng.uniform(0.05, 1.0, (self.tokens, self.top_k)).astype(np.float32)
        return x, np.stack(ids).astype(np.int32), weights, gate_up, down

    def build_packed(self, seed: int = 0) -> tuple[PackedWeight, PackedWeight]:
        """gate_up and down, of the sizes above."""
        assert self.packing is not None
        E, D, F = self.experts, self.embed, self.mlp
        return (
            random_packed((E, 2 * F, D), self.packing, seed, size=D**-0.5),
            random_packed((E, D, F), self.packing, seed + 1, size=F**-0.5),
        )


CASES = (
    Case(1, 1, 1),
    Case(1, 2, 8),
    Case(1, 8, 16, dtype="float32"),
    Case(3, 2, 4, dtype="float32"),
    Case(5, 4, 4),  # every expert by every token
    Case(40, 1, 3, dtype="float32"),
    Case(40, 2, 64, touched=2),  # two crowded experts, several tiles each
    Case(64, 8, 32),
    Case(130, 4, 60, embed=98, mlp=38, dtype="float32"),
    Case(600, 2, 4, dtype="float32"),
)
