"""Cases of `silu_mul` for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """Shape (of the result) and dtype of one call."""

    rows: int
    width: int
    dtype: str = "bfloat16"

    def build(self, seed: int = 0) -> np.ndarray:
        """Gate and up side by side, float32; some gates far from zero."""
        x = np.random.default_rng(seed).standard_normal((self.rows, 2 * self.width), np.float32)
        x[0, : min(4, self.width)] = [-200.0, 200.0, -80.0, 0.0][: min(4, self.width)]
        return x


CASES = (
    Case(1, 1536),
    Case(3, 100, "float32"),
    Case(100, 700),
    Case(100, 700, "float32"),
    Case(2, 5),
)
