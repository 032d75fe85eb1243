"""Cases of `rms_norm` for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """Shape and dtype of one call."""

    rows: int
    width: int
    dtype: str = "bfloat16"
    eps: float = 1e-5

    def build(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """x and weight in float32."""
        rng = np.random.default_rng(seed)
        x = 3 * rng.standard_normal((self.rows, self.width), np.float32)
        return x, rng.standard_normal(self.width, np.float32)


CASES = (
    Case(1, 576),
    Case(7, 576, "float32"),
    Case(200, 576, "float32"),
    Case(200, 576),
    Case(3, 64, "float32", eps=1e-6),
    Case(5, 70, "float32"),
    Case(33, 1000),
)
