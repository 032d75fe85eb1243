"""Cases of attention over several caches at once for tests: every back end runs each of them."""

from dataclasses import dataclass, field

import numpy as np

from jengine.pallas_kernels.sparse_mla_attention import cases as sparse

SINKS = (-30.0, 0.0, 2.0, 30.0)  # of no weight, and of nearly all


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call in float32 and int32; queries past `num_tokens` are padding."""

    q_TNE: np.ndarray
    caches: tuple[tuple[np.ndarray, np.ndarray], ...]  # (pages, slots) of each
    sinks_N: np.ndarray
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Case:
    """`window` and `entries`: slots that each token attends to, of at most `widths` in each cache;
    without `entries` there is one cache.
    """

    window: tuple[int, ...]
    entries: tuple[int, ...] = ()
    widths: tuple[int, int] = (256, 256)
    heads: int = 4
    dim: int = 32
    dtype: str = "bfloat16"
    page_dtype: str = field(default="")  # "": as the queries
    padding_tokens: int = 3

    def build(self, seed: int = 0) -> Inputs:
        """Slots that no token attends to hold NaN, and so does what lies behind each entry."""
        parts = [
            sparse.Case(
                counts, width, self.heads, self.dim - 8, 8, page_size=page_size,
                num_pages=2 + -(-2 * width // page_size), padding_tokens=self.padding_tokens,
            ).build(seed + i)
            for i, (counts, width, page_size) in enumerate(
                zip((self.window, self.entries), self.widths, (16, 4), strict=True)
            )
            if counts
        ]  # fmt: skip
        return Inputs(
            parts[0].q_TNE,
            tuple((part.pages_PBE, part.slots_Tk) for part in parts),
            np.resize(np.array(SINKS, np.float32), self.heads),
            len(self.window),
        )


WINDOW, ENTRIES = (1, 7, 128, 128, 130, 3), (0, 1, 129, 256, 0, 7)
CASES = (
    Case(WINDOW),
    Case(WINDOW, dtype="float32"),
    Case(WINDOW, ENTRIES),
    Case(WINDOW, ENTRIES, dtype="float32"),
    Case(WINDOW, ENTRIES, (130, 257), page_dtype="float32"),
)
# In splits: many blocks of few tokens, and so many tokens that there are none.
SPLIT = (
    Case((128, 1, 64), (700, 0, 33), (128, 1000), heads=20, padding_tokens=1),
    Case((128,), (512,), (128, 512), heads=64, dim=512, padding_tokens=0),
    Case((5,), (900,), (8, 900), dim=40, dtype="float32", padding_tokens=0),
    Case((40, 2, 70) * 30, (9, 0, 80) * 30, (70, 80), heads=80, dim=64),
)
