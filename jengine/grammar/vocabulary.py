"""A model's tokens as llguidance sees them, and matchers over them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Self

import llguidance
import numpy as np

from jengine.grammar import limits
from jengine.text.tokenizer import Tokenizer


class GrammarError(Exception):
    """A grammar that cannot be used; the message says why."""


class Vocabulary:
    """Thread-safe. `table[i]` is what token i adds to a text. `encode` gives the model's own tokens
    for a text that the grammar forces; without it the longest ones are taken.
    """

    def __init__(
        self,
        table: Sequence[bytes],
        special_ids: Iterable[int],
        eos_ids: Iterable[int],
        vocab_size: int,
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        # The model's vocabulary is often padded: the tokens without text are never allowed.
        tokens = [*table[:vocab_size], *[b""] * (vocab_size - len(table))]
        eos = [i for i in eos_ids if 0 <= i < vocab_size]
        if not eos:  # a model without an end gets one that it cannot sample
            tokens.append(b"<|end|>")
            eos = [vocab_size]
        self.vocab_size = vocab_size
        self.special_ids = frozenset(i for i in special_ids if i < vocab_size).union(eos)
        self.tokens = tokens
        self._encode = encode
        self._ll: llguidance.LLTokenizer | None = None
        self._ll = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokenizer(self, eos[0])), eos_token=eos
        )
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=limits.MAX_ITEMS_IN_ROW,
            step_max_items=limits.STEP_MAX_ITEMS,
            step_lexer_fuel=limits.STEP_LEXER_FUEL,
            max_lexer_states=limits.MAX_LEXER_STATES,
            verbose_errors=False,
        )

    @classmethod
    def of(cls, tokenizer: Tokenizer, eos_ids: Iterable[int], vocab_size: int) -> Self:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        table, special_ids = tokenizer.pieces.table, tokenizer.all_special_ids
        return cls(table, special_ids, eos_ids, vocab_size, encode)

    @property
    def num_words(self) -> int:
        """Of a mask: one bit for each token."""
        return -(-self.vocab_size // 32)

    def build(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at its start, with its first mask computed once: that is when most of a lexer
        is made. Raises `GrammarError`. Releases the interpreter lock.
        """
        assert self._ll is not None
        matcher = llguidance.LLMatcher(self._ll, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            self.compute_mask(matcher)
        if error := matcher.get_error():
            raise GrammarError(short_message(error))
        return matcher

    def compute_mask(self, matcher: llguidance.LLMatcher) -> np.ndarray:
        """i32[num_words]: bit i is set if token i may come next. Releases the interpreter lock."""
        mask = np.zeros(-(-len(self.tokens) // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask[: self.num_words]

    def words_of(self, token_ids: Iterable[int]) -> np.ndarray:
        """i32[num_words] with the bits of these tokens."""
        bits = np.zeros(self.num_words * 32, np.uint8)
        bits[[i for i in token_ids if 0 <= i < self.vocab_size]] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def tokenize(self, data: bytes) -> list[int]:
        """Tokens that add exactly `data`."""
        if self._ll is None:  # llguidance tries what it is given
            return []
        if self._encode is not None:
            ids = self._encode(data.decode("utf-8", "replace"))
            # Some tokenizers put a space before the first word, or take text for a special token.
            is_plain = self.special_ids.isdisjoint(ids)
            if is_plain and b"".join([self.tokens[i] for i in ids]) == data:
                return ids
        return self._ll.greedy_tokenize(data.decode("utf-8", "replace"))


def short_message(error: str) -> str:
    """An error of llguidance without the grammar's text, in one line."""
    text = error.partition("\n<non-verbose/>")[0].partition("\n   1 |")[0]
    text = " ".join(text.split())
    known = {
        "NoExtensionBias": "nothing satisfies it",
        "NoExtension": "nothing satisfies it",
    }
    text = known.get(text, text)
    most = limits.MAX_MESSAGE_CHARS
    return text if len(text) <= most else text[: most - 3] + "..."


class _Tokenizer:
    """What `llguidance.TokenizerWrapper` asks for."""

    def __init__(self, vocabulary: Vocabulary, eos_id: int) -> None:
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted(vocabulary.special_ids)
        self._vocabulary = vocabulary

    def __call__(self, data: bytes) -> list[int]:
        return self._vocabulary.tokenize(data)
