"""Cases of `linear` for tests and benchmarks: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes and dtypes of one call."""

    rows: int
    depth: int
    outputs: int
    x_dtype: str = "bfloat16"
    w_dtype: str = "bfloat16"
    out_dtype: str = "bfloat16"
    has_bias: bool = False

    def build(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """x, w and bias in float32, of size one."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((self.rows, self.depth), np.float32)
        w = rng.standard_normal((self.outputs, self.depth), np.float32)
        return x, w, rng.standard_normal(self.outputs, np.float32) if self.has_bias else None


CASES = (
    Case(1, 576, 960),
    Case(2, 64, 16, out_dtype="float32"),
    Case(3, 576, 576, has_bias=True),
    Case(5, 98, 37, out_dtype="float32", has_bias=True),  # tails in depth and outputs
    Case(8, 1536, 576),
    Case(9, 30, 65, has_bias=True),
    Case(33, 700, 130, out_dtype="float32"),
    Case(130, 576, 200, has_bias=True),
    Case(1, 576, 576, "float32", "float32", "float32"),
    Case(4, 33, 19, "float32", "float32", "float32", has_bias=True),
    Case(50, 601, 100, "float32", "float32", "float32"),
    Case(3, 96, 48, "float32", "bfloat16", "float32", has_bias=True),
    Case(40, 96, 48, "float32", "bfloat16", "float32"),
)
