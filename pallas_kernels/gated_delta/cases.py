"""Cases of `gated_delta` and `short_conv` for tests: every back end runs each of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of both operations, in float32 and int32; tokens past the last are padding."""

    q_TKH: np.ndarray
    k_TKH: np.ndarray
    v_TNV: np.ndarray
    log_decay_TN: np.ndarray
    beta_TN: np.ndarray
    x_TC: np.ndarray
    weight_CW: np.ndarray
    states_PE: np.ndarray
    slots_2S: np.ndarray
    seq_ids_T: np.ndarray
    cu_q_lens_S1: np.ndarray


@dataclass(frozen=True, slots=True)
class Case:
    """A batch: `lens` holds (new tokens, whether there were some before) of each sequence."""

    lens: tuple[tuple[int, bool], ...]
    key_heads: int = 2
    value_heads: int = 4
    key_dim: int = 16
    value_dim: int = 24
    width: int = 4  # of the convolution
    channels: int = 40
    decay: float = 0.3  # mean of its negative logarithm
    alike: bool = False  # keys are nearly equal and beta near one: the hardest system to solve
    padding_tokens: int = 3
    padding_seqs: int = 2

    @property
    def num_tokens(self) -> int:
        return sum(new for new, _ in self.lens)

    @property
    def is_decode(self) -> bool:
        return all(new == 1 for new, _ in self.lens) and self.padding_tokens == self.padding_seqs

    def build(self, seed: int = 0) -> Inputs:
        """Slots are shuffled; all that no sequence reads hold NaN, the null slot 0 included. A
        sequence with a past reads another slot than it writes, or every third one the same.
        """
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        T, S = self.num_tokens + self.padding_tokens, len(self.lens) + self.padding_seqs
        K, N, H, V = self.key_heads, self.value_heads, self.key_dim, self.value_dim
        k_TKH = normal(1, K, H) + 0.01 * normal(T, K, H) if self.alike else normal(T, K, H)
        width = N * H * V + (self.width - 1) * self.channels
        states = np.full((2 * S + 1, width), np.nan, np.float32)
        ids = 1 + rng.permutation(2 * S).astype(np.int32)
        slots = np.full((2, S), -1, np.int32)
        for s, (_, has_past) in enumerate(self.lens):
            slots[1, s] = ids[2 * s]
            if has_past:
                slots[0, s] = ids[2 * s + (s % 3 > 0)]
                states[slots[0, s]] = normal(width)
        lens = [new for new, _ in self.lens] + [0] * self.padding_seqs
        seq_ids = np.repeat(np.arange(S, dtype=np.int32), lens)
        beta = 1 / (1 + np.exp(-normal(T, N) - (4 if self.alike else 0)))
        return Inputs(
            q_TKH=normal(T, K, H) / H,
            k_TKH=k_TKH / np.linalg.norm(k_TKH, axis=-1, keepdims=True),
            v_TNV=normal(T, N, V),
            log_decay_TN=-rng.exponential(self.decay, (T, N)).astype(np.float32),
            beta_TN=beta.astype(np.float32),
            x_TC=normal(T, self.channels),
            weight_CW=normal(self.channels, self.width),
            states_PE=states,
            slots_2S=slots,
            seq_ids_T=np.pad(seq_ids, (0, self.padding_tokens)),
            cu_q_lens_S1=np.concatenate([[0], np.cumsum(lens)]).astype(np.int32),
        )


MIXED = ((37, False), (1, True), (1, False), (130, True), (2, True), (64, False), (1, True))
CASES = (
    Case(MIXED),
    Case(MIXED, key_heads=3, value_heads=3, key_dim=8, value_dim=8, width=2),
    Case(((200, True), (3, True), (129, False)), key_heads=1, value_heads=4, decay=5.0),
    Case(((256, False), (65, True)), decay=0.001, alike=True),
    Case(((1, True), (1, False), (1, True), (1, True)), padding_tokens=2),
    Case(((90, True),), key_dim=128, value_dim=128, padding_tokens=0, padding_seqs=0),  # Qwen's
)
