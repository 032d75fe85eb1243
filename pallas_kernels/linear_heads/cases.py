"""Cases of `linear_heads` for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes and dtypes of one call; `num_tokens` of `max_tokens` rows are real."""

    num_tokens: int
    max_tokens: int
    heads: int
    depth: int
    outputs: int
    x_dtype: str = "bfloat16"
    w_dtype: str = "bfloat16"

    def build(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """x and w in float32, of size one."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((self.max_tokens, self.heads, self.depth), np.float32)
        return x, rng.standard_normal((self.heads, self.outputs, self.depth), np.float32)


CASES = (
    Case(1, 1, 16, 128, 512),
    Case(3, 8, 16, 512, 128),
    Case(19, 19, 3, 24, 10, "float32", "float32"),
    Case(5, 6, 4, 32, 40, "float32", "bfloat16"),
    Case(0, 2, 2, 16, 8),
)
