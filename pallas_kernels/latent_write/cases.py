"""Cases of `latent_write` for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """`num_tokens` of `max_tokens` rows are real."""

    num_tokens: int
    max_tokens: int
    entry_dim: int = 40
    num_pages: int = 9
    new_dtype: str = "bfloat16"
    page_dtype: str = "bfloat16"
    dropped: tuple[int, ...] = ()  # tokens with a negative slot

    def build(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pages, entries, slots. Padding rows hold a valid slot: they must not arrive."""
        rng = np.random.default_rng(seed)
        pages = rng.standard_normal((self.num_pages, 16, self.entry_dim), np.float32)
        entries = rng.standard_normal((self.max_tokens, self.entry_dim), np.float32)
        slots = rng.permutation(self.num_pages * 16)[: self.max_tokens].astype(np.int32)
        slots[list(self.dropped)] = -1
        return pages, entries, slots


CASES = (
    Case(1, 1),
    Case(5, 8, dropped=(0, 3)),
    Case(0, 4),
    Case(60, 64, entry_dim=576, dropped=(7, 59)),
    Case(6, 7, new_dtype="float32", page_dtype="float32"),
    Case(6, 7, new_dtype="float32"),
    Case(6, 7, page_dtype="float32"),
)
