"""Cases of ragged paged attention for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call in float32 and int32; queries past the last token are padding."""

    q_TNH: np.ndarray
    kv_pages_PB2KH: np.ndarray
    page_table_SM: np.ndarray
    cu_q_lens_S1: np.ndarray
    kv_lens_S: np.ndarray
    num_seqs: int
    sinks_N: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Case:
    """A batch: `lens` holds (new tokens, context length with them) of each sequence."""

    lens: tuple[tuple[int, int], ...]
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    page_size: int = 16
    q_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    # Keys from here on are large: a few positions weigh as much as thousands before them.
    loud_from: int | None = None
    padding_tokens: int = 3
    padding_seqs: int = 2

    def build(self, seed: int = 0) -> Inputs:
        """Pages are shuffled; every slot that no query may read holds NaN, the null page 0
        included.
        """
        rng = np.random.default_rng(seed)
        pages_per_seq = max(-(-kv // self.page_size) for _, kv in self.lens) + 1
        num_pages = 1 + len(self.lens) * pages_per_seq
        ids = 1 + rng.permutation(num_pages - 1).astype(np.int32)
        table = np.zeros((len(self.lens) + self.padding_seqs, pages_per_seq), np.int32)
        pages = np.full(
            (num_pages, self.page_size, 2, self.kv_heads, self.head_dim), np.nan, np.float32
        )
        for s, (new, length) in enumerate(self.lens):
            first = 0 if self.window is None else max(0, length - new - self.window + 1)
            table[s] = ids[s * pages_per_seq : (s + 1) * pages_per_seq]
            table[s, : first // self.page_size] = 0  # freed: left the window
            at = np.arange(first, length)
            entries = rng.standard_normal((length, 2, self.kv_heads, self.head_dim), np.float32)
            if self.loud_from is not None:
                entries[self.loud_from :, 0] *= 4
            pages[table[s][at // self.page_size], at % self.page_size] = entries[first:]
        new_lens = [new for new, _ in self.lens]
        cu = np.concatenate([[0], np.cumsum(new_lens), np.full(self.padding_seqs, sum(new_lens))])
        return Inputs(
            q_TNH=rng.standard_normal(
                (sum(new_lens) + self.padding_tokens, self.heads, self.head_dim), np.float32
            ),
            kv_pages_PB2KH=pages,
            page_table_SM=table,
            cu_q_lens_S1=cu.astype(np.int32),
            kv_lens_S=np.array([kv for _, kv in self.lens] + [0] * self.padding_seqs, np.int32),
            num_seqs=len(self.lens),
            sinks_N=rng.standard_normal(self.heads, np.float32) if self.has_sinks else None,
        )


LONG = ((1, 8300), (5, 8194), (1, 8192), (3, 8230))  # around the first chunk's end
MIXED = ((37, 37), (1, 200), (1, 1), (50, 130), (1, 64), (1, 65), (7, 300))
CASES = (
    Case(MIXED),
    Case(LONG, heads=2, kv_heads=1, loud_from=8192),
    Case(MIXED, q_dtype="float32", kv_dtype="float32"),
    Case(MIXED, q_dtype="float32", kv_dtype="bfloat16"),
    Case(MIXED, q_dtype="bfloat16", kv_dtype="float32"),
    Case(MIXED, window=20),
    Case(MIXED, window=64, page_size=32, has_sinks=True),
    Case(MIXED, window=1, heads=2, kv_heads=2),
    Case(MIXED, soft_cap=5.0),
    Case(MIXED, has_sinks=True, q_dtype="float32", kv_dtype="float32"),
    Case(((1, 129),), heads=8, kv_heads=1, head_dim=256, page_size=8),
    Case(((70, 100), (1, 33)), heads=4, kv_heads=4, head_dim=80),
    Case(((70, 100), (1, 33)), heads=32, kv_heads=2, head_dim=96, page_size=64),
    Case(
        ((20, 20), (1, 500)),
        heads=16,
        kv_heads=8,
        head_dim=128,
        q_dtype="float32",
        kv_dtype="float32",
    ),
    Case(tuple((1, n) for n in range(1, 40, 3)), padding_tokens=0, padding_seqs=0),
)
# Long enough for the kernels that only long prompts meet.
LONG_CASES = (
    Case(((384, 384), (1, 700), (133, 470)), heads=8, kv_heads=2, head_dim=128),
    Case(((64, 64), (500, 1300), (1, 5)), heads=4, kv_heads=2, page_size=32),
)
