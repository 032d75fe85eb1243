"""Text of a growing sequence of tokens."""

import codecs
from collections.abc import Iterable, Sequence

from jengine.text.tokenizer import Tokenizer

PROMPT_TAIL = 8  # tokens looked back for a character the prompt left unfinished (3 bytes at most)


class IncrementalDetokenizer:
    """One completion's text, as its tokens come. `"".join` of everything returned is the text of
    all tokens.

    A character is returned with the token that completes it: text never changes once returned, and
    U+FFFD appears only for bytes that no later token can complete. The text continues the prompt's:
    a leading space is kept, and a character that the prompt left unfinished is finished.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        """`spaces_between_special_tokens` is accepted for vLLM's sake: as there, it has no effect
        on tokenizers of the `tokenizers` library.
        """
        self._pieces = tokenizer.pieces
        self._skip_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_next = False
        if self._pieces.strips_space:
            self._strip_next = not self._has_text(prompt_token_ids)
        tail = self._pieces.join(prompt_token_ids[-PROMPT_TAIL:], skip_special_tokens)
        self._decoder.decode(tail)  # leaves only the bytes of an unfinished character behind

    def add(self, token_ids: Iterable[int]) -> str:
        """The text these tokens complete."""
        data = self._pieces.join(token_ids, self._skip_special)
        if self._strip_next and data:
            data = data.removeprefix(b" ")
            self._strip_next = False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """U+FFFD if the last character is still unfinished; the end."""
        return self._decoder.decode(b"", final=True)

    def _has_text(self, token_ids: Sequence[int]) -> bool:
        return any(self._pieces.join((i,), self._skip_special) for i in token_ids)
