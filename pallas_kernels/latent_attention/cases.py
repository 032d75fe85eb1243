"""Cases of `latent_attention` for tests: those of `mla_attention`, and what heads expand to."""

from dataclasses import dataclass

import numpy as np

from jengine.pallas_kernels.mla_attention.cases import MIXED, Inputs
from jengine.pallas_kernels.mla_attention.cases import Case as LatentCase


@dataclass(frozen=True, slots=True)
class Case:
    """`key_dim` (P) and `value_dim` (V) of the heads of `latents`' batch."""

    latents: LatentCase
    key_dim: int = 32
    value_dim: int = 24

    def build(self, seed: int = 0) -> tuple[Inputs, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The batch, queries [T, N, P + R], entries [T, E], up_k [N, C, P] and up_v [N, V, C]."""
        case, rng = self.latents, np.random.default_rng(seed + 1)
        given = case.build(seed)
        T, N, C = len(given.q_TNE), case.heads, case.value_dim
        q = rng.standard_normal((T, N, self.key_dim + case.rope_dim), np.float32)
        entries = rng.standard_normal((T, case.entry_dim), np.float32)  # of padding
        for s, (new, length) in enumerate(case.lens):
            first, at = given.cu_q_lens_S1[s], np.arange(length - new, length)
            pages = given.page_table_SM[s][at // case.page_size]
            entries[first : first + new] = given.pages_PBE[pages, at % case.page_size]
        up_k = rng.standard_normal((N, C, self.key_dim), np.float32) / np.float32(C**0.5)
        up_v = rng.standard_normal((N, self.value_dim, C), np.float32) / np.float32(C**0.5)
        return given, q, entries, up_k, up_v


CASES = (
    Case(LatentCase(MIXED)),
    Case(LatentCase(MIXED, q_dtype="float32", page_dtype="float32")),
    Case(LatentCase(((20, 20), (1, 300)), heads=16, value_dim=512, rope_dim=64), 128, 128),
    Case(LatentCase(((300, 300), (5, 5), (150, 400)), heads=2, rope_dim=8), 24, 40),
    Case(LatentCase(((1, 9), (1, 90)), padding_tokens=0, padding_seqs=0)),
)
