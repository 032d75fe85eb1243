"""Cases of `read_streams` for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call in float32."""

    streams_TCD: np.ndarray
    fn_RX: np.ndarray
    base_R: np.ndarray
    scale_3: np.ndarray
    norm_D: np.ndarray


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes of one call, the dtype of the streams, and what Sinkhorn's rounds are told."""

    tokens: int
    width: int
    streams: int = 4
    dtype: str = "bfloat16"
    iterations: int = 20
    eps: float = 1e-6

    def build(self, seed: int = 0) -> Inputs:
        rng = np.random.default_rng(seed)
        c, rows = self.streams, 2 * self.streams + self.streams**2

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        return Inputs(
            3 * normal(self.tokens, c, self.width),
            normal(rows, c * self.width) / (c * self.width) ** 0.5,
            normal(rows),
            normal(3),
            1 + normal(self.width) / 4,
        )


CASES = (
    Case(5, 96),
    Case(1, 64, dtype="float32"),
    Case(19, 80, streams=3, dtype="float32", iterations=1, eps=1e-3),
    Case(3, 40, streams=2, iterations=3),
)
