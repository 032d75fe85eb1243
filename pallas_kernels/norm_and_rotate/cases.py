"""Cases of `norm_and_rotate` for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes of one call: so many pairs of each head are rotated."""

    tokens: int
    heads: int
    dim: int
    pairs: int
    dtype: str = "bfloat16"

    def build(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, cosines and sines in float32."""
        rng = np.random.default_rng(seed)
        x = 3 * rng.standard_normal((self.tokens, self.heads, self.dim), np.float32)
        angles = rng.uniform(-3, 3, (self.tokens, self.pairs)).astype(np.float32)
        return x, np.cos(angles), np.sin(angles)


CASES = (
    Case(5, 3, 24, 4),
    Case(3, 1, 20, 3, "float32"),
    Case(7, 9, 128, 32),
    Case(2, 4, 16, 8, "float32"),
)
