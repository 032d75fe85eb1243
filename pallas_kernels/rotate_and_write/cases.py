"""Cases of `rotate_and_write` for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments in float32 and int32."""

    qkv_PTXH: np.ndarray
    cos_TR: np.ndarray
    sin_TR: np.ndarray
    kv_pages_PB2KH: np.ndarray
    slots_T: np.ndarray
    norms_2H: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Case:
    """`num_tokens` of `max_tokens` rows are real."""

    num_tokens: int
    max_tokens: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotated: int = 64
    has_norms: bool = False
    dtype: str = "bfloat16"
    page_dtype: str = "bfloat16"
    dropped: tuple[int, ...] = ()  # tokens with a negative slot
    parts: int = 1

    def build(self, seed: int = 0) -> Inputs:
        """Padding rows hold a valid slot and large numbers: they must not arrive in the pages."""
        rng = np.random.default_rng(seed)
        num_heads = self.heads + 2 * self.kv_heads
        shape = (self.parts, self.max_tokens, num_heads, self.head_dim)
        qkv = 3 * rng.standard_normal(shape, np.float32)
        qkv[:, self.num_tokens :] = 1e6
        angles = rng.uniform(0, 6.28, (self.max_tokens, self.rotated // 2))
        pages = rng.standard_normal((9, 16, 2, self.kv_heads, self.head_dim), np.float32)
        slots = rng.permutation(9 * 16)[: self.max_tokens].astype(np.int32)
        slots[list(self.dropped)] = -1
        norms = 1 + 0.3 * rng.standard_normal((2, self.head_dim), np.float32)
        return Inputs(
            qkv,
            np.cos(angles).astype(np.float32),
            np.sin(angles).astype(np.float32),
            pages,
            slots,
            norms if self.has_norms else None,
        )


CASES = (
    Case(1, 1),
    Case(5, 8, dropped=(0, 3)),
    Case(0, 4),
    Case(60, 64, heads=9, kv_heads=3, dropped=(7, 59)),
    Case(6, 7, has_norms=True),
    Case(6, 7, heads=16, kv_heads=8, head_dim=128, rotated=128, has_norms=True, dtype="float32",
         page_dtype="float32"),
    Case(3, 4, head_dim=80, rotated=80, has_norms=True, dtype="float32", page_dtype="float32"),
    Case(3, 4, head_dim=64, rotated=32, has_norms=True),
    Case(6, 7, dtype="float32"),
    Case(6, 7, page_dtype="float32", kv_heads=1),
    Case(6, 7, parts=4),
    Case(6, 7, has_norms=True, parts=2),
    Case(6, 7, parts=2, page_dtype="float32"),  # rounded as the queries are
)  # fmt: skip
