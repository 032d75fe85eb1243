"""Cases of attention over chosen latents for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call in float32 and int32; queries past `num_tokens` are padding."""

    q_TNE: np.ndarray
    pages_PBE: np.ndarray
    slots_Tk: np.ndarray
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Case:
    """`counts`: slots that each token attends to, of at most `top_k`."""

    counts: tuple[int, ...]
    top_k: int
    heads: int = 4
    value_dim: int = 64  # kv_lora_rank
    rope_dim: int = 16
    other_dim: int = 32  # of an entry, not of the attention
    page_size: int = 16
    num_pages: int = 40
    q_dtype: str = "bfloat16"
    page_dtype: str = "bfloat16"
    padding_tokens: int = 3

    def build(self, seed: int = 0) -> Inputs:
        """Every slot that no token attends to holds NaN, and so does the rest of each entry."""
        rng = np.random.default_rng(seed)
        E, T = self.value_dim + self.rope_dim, len(self.counts) + self.padding_tokens
        num_slots = self.num_pages * self.page_size
        slots = np.full((T, self.top_k), -1, np.int32)
        for t, count in enumerate(self.counts):
            slots[t, :count] = self.page_size + rng.permutation(num_slots - self.page_size)[:count]
        slots[len(self.counts) :] = rng.integers(num_slots, size=(self.padding_tokens, self.top_k))
        rows = np.full((num_slots, E + self.other_dim), np.nan, np.float32)
        used = np.unique(slots[: len(self.counts)])
        used = used[used >= 0]
        rows[used, :E] = rng.standard_normal((len(used), E), np.float32)
        return Inputs(
            rng.standard_normal((T, self.heads, E), np.float32),
            rows.reshape(self.num_pages, self.page_size, -1),
            slots,
            len(self.counts),
        )


MIXED = (1, 7, 127, 128, 129, 200, 2, 256)
CASES = (
    Case(MIXED, 256),
    Case(MIXED, 256, q_dtype="float32", page_dtype="float32"),
    Case(MIXED, 300, q_dtype="float32"),
    Case(MIXED, 256, page_dtype="float32"),
    Case((5, 8, 8), 8, heads=3, value_dim=24, rope_dim=6, other_dim=0, q_dtype="float32",
         page_dtype="float32"),
    Case((300, 20), 300, heads=16, value_dim=512, rope_dim=64, other_dim=128),
    Case((40,) * 9, 40, heads=128, padding_tokens=0),
)  # fmt: skip
