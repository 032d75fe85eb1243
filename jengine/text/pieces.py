"""Bytes of every token: what decoding adds to the text, token by token.

A token is bytes, not characters: CJK and emoji are split over several. `tokenizers` decodes whole
sequences only, and its DecodeStream decodes a growing window again and again, withholds text while
the window ends in U+FFFD even where the model meant it, and fails on some sequences ("Invalid
prefix encountered"). With a table of bytes, decoding is a lookup and one incremental UTF-8 decoder,
exact for any sequence of ids.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from jengine.errors import LoadError

SPM_SPACE = "\u2581"  # SentencePiece writes a space so
_DECODERS = ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip")


class TokenPieces:
    """`table[i]` is what token i adds, in any place but the first (see `strips_space`)."""

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: Iterable[int]) -> None:
        steps = _decoder_steps(backend)
        kinds = [step["type"] for step in steps]
        if "ByteLevel" in kinds:
            to_bytes = _byte_level_piece
        else:
            replaced = [
                (s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"
            ]
            has_bytes = "ByteFallback" in kinds

            def to_bytes(token: str) -> bytes:
                if has_bytes and (value := _byte_token(token)) is not None:
                    return value
                for old, new in replaced:
                    token = token.replace(old, new)
                return token.encode("utf-8")

        vocab = backend.get_vocab(with_added_tokens=True)
        self.table: list[bytes] = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, i in vocab.items():
            self.table[i] = to_bytes(token)
        self.special_ids = frozenset(special_ids)
        # SentencePiece puts a space before the first word, and takes it away when decoding a whole
        # text.
        self.strips_space = any(s["type"] == "Strip" and s["start"] > 0 for s in steps)

    def bytes_of(self, i: int) -> bytes:
        return self.table[i] if 0 <= i < len(self.table) else b""

    def join(self, ids: Iterable[int], skip_special_tokens: bool) -> bytes:
        table, size = self.table, len(self.table)
        skipped = self.special_ids if skip_special_tokens else ()
        return b"".join([table[i] for i in ids if 0 <= i < size and i not in skipped])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of a whole sequence; bytes that are no UTF-8 become U+FFFD."""
        data = self.join(ids, skip_special_tokens)
        if self.strips_space:
            data = data.removeprefix(b" ")
        return codecs.decode(data, "utf-8", "replace")


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's steps. Raises `LoadError` for those that are not sums over tokens, as
    WordPiece's.
    """
    if backend.decoder is None:
        raise LoadError("the tokenizer has no decoder: its tokens cannot be turned into text")
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    for step in steps:
        if step["type"] not in _DECODERS or (
            step["type"] == "Replace" and "String" not in step["pattern"]
        ):
            raise LoadError(
                f"tokenizer decoder {step['type']!r} is not supported; "
                f"known: {', '.join(_DECODERS)}"
            )
    return steps


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte, reversed: characters that print stand for
    themselves, the others follow from U+0100 on.
    """
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


_BYTE_OF = _byte_level_alphabet()


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[c] for c in token])
    except KeyError:  # an added token, written as plain text
        return token.encode("utf-8")


def _byte_token(token: str) -> bytes | None:
    """SentencePiece's `<0x0A>`."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None
