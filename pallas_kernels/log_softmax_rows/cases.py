"""Cases of `log_softmax_rows` for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """Shape of one call."""

    rows: int
    vocab_size: int

    def build(self, seed: int = 0) -> np.ndarray:
        """Logits in float32; some far from the others, some cut."""
        x = 4 * np.random.default_rng(seed).standard_normal((self.rows, self.vocab_size))
        x[:, 1::7] = -np.inf
        x[0, 0] = 80.0
        return x.astype(np.float32)


CASES = (Case(1, 50), Case(3, 4096), Case(2, 10_000))
