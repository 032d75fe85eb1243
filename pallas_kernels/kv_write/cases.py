"""Cases of `kv_write` for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes and dtypes of one call; `num_tokens` of `max_tokens` rows are real."""

    num_tokens: int
    max_tokens: int
    num_pages: int = 9
    page_size: int = 16
    kv_heads: int = 3
    head_dim: int = 64
    page_dtype: str = "bfloat16"
    new_dtype: str = "bfloat16"
    dropped: tuple[int, ...] = ()  # tokens with a negative slot

    def build(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """pages, k, v in float32 and slots; padding rows hold a valid slot and NaN: they must not
        arrive.
        """
        rng = np.random.default_rng(seed)
        shape = (self.max_tokens, self.kv_heads, self.head_dim)
        pages = rng.standard_normal((self.num_pages, self.page_size, 2, *shape[1:]), np.float32)
        k, v = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
        slots = rng.permutation(self.num_pages * self.page_size)[: self.max_tokens].astype(np.int32)
        slots[list(self.dropped)] = -1
        k[self.num_tokens :] = v[self.num_tokens :] = np.nan
        return pages, k, v, slots


CASES = (
    Case(1, 1),
    Case(5, 8, dropped=(0, 3)),
    Case(0, 4),
    Case(100, 128, dropped=(7, 99)),
    Case(6, 6, page_dtype="float32", new_dtype="float32", kv_heads=1, head_dim=80),
    Case(6, 7, page_dtype="bfloat16", new_dtype="float32"),
    Case(6, 7, page_dtype="float32", new_dtype="bfloat16", page_size=32),
)
