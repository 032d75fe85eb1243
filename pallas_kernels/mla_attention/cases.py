"""Cases of attention over latents for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call in float32 and int32; queries past the last token are padding."""

    q_TNE: np.ndarray
    pages_PBE: np.ndarray
    page_table_SM: np.ndarray
    cu_q_lens_S1: np.ndarray
    kv_lens_S: np.ndarray
    num_seqs: int


@dataclass(frozen=True, slots=True)
class Case:
    """A batch: `lens` holds (new tokens, context length with them) of each sequence."""

    lens: tuple[tuple[int, int], ...]
    heads: int = 4
    value_dim: int = 64  # kv_lora_rank
    rope_dim: int = 16
    page_size: int = 16
    q_dtype: str = "bfloat16"
    page_dtype: str = "bfloat16"
    padding_tokens: int = 3
    padding_seqs: int = 2

    @property
    def entry_dim(self) -> int:
        return self.value_dim + self.rope_dim

    def build(self, seed: int = 0) -> Inputs:
        """Pages are shuffled; every slot that no query may read holds NaN, the null page 0
        included.
        """
        rng = np.random.default_rng(seed)
        B, E = self.page_size, self.entry_dim
        pages_per_seq = max(-(-kv // B) for _, kv in self.lens) + 1
        num_pages = 1 + len(self.lens) * pages_per_seq
        ids = 1 + rng.permutation(num_pages - 1).astype(np.int32)
        table = np.zeros((len(self.lens) + self.padding_seqs, pages_per_seq), np.int32)
        pages = np.full((num_pages, B, E), np.nan, np.float32)
        for s, (_, length) in enumerate(self.lens):
            table[s] = ids[s * pages_per_seq : (s + 1) * pages_per_seq]
            at = np.arange(length)
            pages[table[s][at // B], at % B] = rng.standard_normal((length, E), np.float32)
        new_lens = [new for new, _ in self.lens]
        cu = np.concatenate([[0], np.cumsum(new_lens), np.full(self.padding_seqs, sum(new_lens))])
        num_tokens = sum(new_lens) + self.padding_tokens
        return Inputs(
            q_TNE=rng.standard_normal((num_tokens, self.heads, E), np.float32),
            pages_PBE=pages,
            page_table_SM=table,
            cu_q_lens_S1=cu.astype(np.int32),
            kv_lens_S=np.array([kv for _, kv in self.lens] + [0] * self.padding_seqs, np.int32),
            num_seqs=len(self.lens),
        )


MIXED = ((37, 37), (1, 200), (1, 1), (50, 130), (1, 64), (1, 65), (7, 300))
CASES = (
    Case(MIXED),
    Case(MIXED, q_dtype="float32", page_dtype="float32"),
    Case(MIXED, q_dtype="float32"),
    Case(MIXED, page_dtype="float32"),
    Case(((20, 20), (1, 300)), heads=16, value_dim=512, rope_dim=64),  # DeepSeek-V2-Lite
    Case(((9, 140), (1, 129)), heads=3, value_dim=24, rope_dim=6, page_size=8,
         q_dtype="float32", page_dtype="float32"),
    Case(tuple((1, n) for n in range(1, 40, 3)), heads=128, padding_tokens=0, padding_seqs=0),
)  # fmt: skip
