"""Cases of `select_tokens` for tests: every back end runs each of them."""

from dataclasses import dataclass, field

import numpy as np

from jengine.pallas_kernels.mla_attention import cases as latents
from jengine.pallas_kernels.mla_attention.cases import MIXED


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call in float32 and int32; queries past the last token are padding."""

    q_TJX: np.ndarray
    weights_TJ: np.ndarray
    pages_PBE: np.ndarray
    page_table_SM: np.ndarray
    cu_q_lens_S1: np.ndarray
    kv_lens_S: np.ndarray
    num_seqs: int


@dataclass(frozen=True, slots=True)
class Case:
    """A batch: `lens` holds (new tokens, context length with them) of each sequence. Of every
    entry the first part, `other_dim` values, is nothing that may be read.
    """

    lens: tuple[tuple[int, int], ...]
    top_k: int
    heads: int = 4
    dim: int = 32
    other_dim: int = 48
    page_size: int = 16
    q_dtype: str = "float32"
    page_dtype: str = "float32"
    # Of this many values only: many scores are equal, exact in any order of summation
    values: tuple[float, ...] = field(default=())
    tokens_per_entry: int = 1

    def build(self, seed: int = 0) -> Inputs:
        """Pages are shuffled; all that may not be read holds NaN."""
        lens = tuple((new, length // self.tokens_per_entry) for new, length in self.lens)
        shape = latents.Case(
            lens, self.heads, self.other_dim, self.dim, self.page_size
        ).build(seed)  # fmt: skip
        shape.kv_lens_S[: len(lens)] = [length for _, length in self.lens]
        rng = np.random.default_rng(seed + 1)
        T = shape.q_TNE.shape[0]
        q = rng.standard_normal((T, self.heads, self.dim), np.float32)
        weights = rng.standard_normal((T, self.heads), np.float32)
        pages = shape.pages_PBE
        if self.values:
            q, weights = (rng.choice(self.values, x.shape).astype(np.float32) for x in (q, weights))
            drawn = rng.choice(self.values, pages.shape).astype(np.float32)
            pages = np.where(np.isnan(pages), pages, drawn)
        pages[..., : self.other_dim] = np.nan
        return Inputs(
            q, weights, pages, shape.page_table_SM, shape.cu_q_lens_S1, shape.kv_lens_S,
            shape.num_seqs,
        )  # fmt: skip


CASES = (
    Case(MIXED, top_k=8),
    Case(MIXED, top_k=64, q_dtype="bfloat16", page_dtype="bfloat16"),
    Case(MIXED, top_k=64, page_dtype="bfloat16"),
    Case(MIXED, top_k=1000),
    Case(MIXED, top_k=1, heads=3, dim=6),
    Case(MIXED, top_k=20, heads=2, dim=4, values=(-1.0, 0.0, 1.0)),
    Case(((30, 90), (1, 77)), top_k=16, heads=1, dim=2, values=(0.0,)),  # all are equal
    Case(((20, 5000), (1, 4100)), top_k=2048, heads=8, dim=16),  # several blocks of the search
    Case(((9, 140), (1, 129)), top_k=5, heads=3, dim=24, other_dim=7, page_size=8),
    Case(((3, 600),), top_k=33, page_size=256),
    Case(tuple((1, n) for n in range(1, 40, 3)), top_k=12, heads=64, dim=128),
    Case(((9, 9), (1, 3), (1, 4), (130, 300), (1, 77), (2, 1025)), top_k=6, tokens_per_entry=4),
    Case(((300, 300), (1, 127), (1, 128)), top_k=2, page_size=2, tokens_per_entry=128),
)
