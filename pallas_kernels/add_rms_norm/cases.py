"""Cases of `add_rms_norm` for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes of one call, and the dtype of the stream; several summands are float32."""

    rows: int
    width: int
    parts: int
    dtype: str = "bfloat16"
    eps: float = 1e-5

    def build(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, summands and weight in float32."""
        rng = np.random.default_rng(seed)
        x = 3 * rng.standard_normal((self.rows, self.width), np.float32)
        parts = rng.standard_normal((self.parts, self.rows, self.width), np.float32)
        return x, parts, rng.standard_normal(self.width, np.float32)


CASES = (
    Case(1, 576, 1),
    Case(1, 4096, 4),
    Case(7, 576, 8),
    Case(64, 100, 2),
    Case(3, 64, 2, "float32", eps=1e-6),
)
