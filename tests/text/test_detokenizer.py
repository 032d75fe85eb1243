"""Streams against one-shot decoding, by `tokenizers` and transformers, for any ids and any cut."""

import codecs
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from jengine.errors import LoadError
from jengine.text.detokenizer import IncrementalDetokenizer
from jengine.text.tokenizer import Tokenizer, TokenizerParts
from tests.oracles.tiny_llama import EOS, VOCAB_SIZE, train_tiny_tokenizer

TEXTS = [
    "Hello, world",
    "世界、你好。こんにちは 안녕하세요",
    "👩‍👩‍👧‍👦 flags 🇩🇪🇯🇵 tone 👍🏽 mixed 😀a😀",
    "naïve e\u0301 \u00a0\u3000 tabs\t\n\n  spaces   ",
    f"special {EOS} inside <|im_start|>",
]


def byte_level() -> Tokenizer:
    specials = {"eos_token": EOS}
    return Tokenizer(TokenizerParts(train_tiny_tokenizer(), specials))


def sentencepiece() -> Tokenizer:
    """Llama-2's kind: spaces as U+2581, bytes as <0xNN>, the first space stripped."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [chr(c) for c in range(0x20, 0x7F)] + ["▁", "世", "▁H", "▁世", "el", "▁▁"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    merges = [("▁", "H"), ("▁", "世"), ("e", "l"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    return Tokenizer(TokenizerParts(backend, {"bos_token": "<s>", "eos_token": "</s>"}))


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece()
KINDS = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "spm"])
FAST = PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL.backend, eos_token=EOS)
IDS = st.lists(st.integers(0, VOCAB_SIZE + 3), max_size=30)  # some beyond the vocabulary


def stream(
    tokenizer: Tokenizer,
    ids: list[int],
    step: int = 1,
    *,
    prompt: Sequence[int] = (),
    skip_special_tokens: bool = True,
) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
    out = [detokenizer.add(ids[i : i + step]) for i in range(0, len(ids), step)]
    return [*out, detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("step", [1, 2, 5])
@KINDS
def test_text_comes_back_exactly(tokenizer: Tokenizer, text: str, step: int) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(stream(tokenizer, ids, step, skip_special_tokens=False)) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    skipped = tokenizer.backend.decode(ids, skip_special_tokens=True)
    assert "".join(stream(tokenizer, ids, step)) == tokenizer.decode(ids) == skipped


@settings(max_examples=400)
@given(IDS, st.booleans())
def test_random_ids_equal_one_shot_decoding_by_everyone(ids: list[int], skip: bool) -> None:
    text = "".join(stream(BYTE_LEVEL, ids, skip_special_tokens=skip))
    assert text == BYTE_LEVEL.decode(ids, skip)
    assert text == BYTE_LEVEL.backend.decode(ids, skip_special_tokens=skip)
    known = [i for i in ids if i < BYTE_LEVEL.vocab_size]  # transformers fails on others
    theirs = FAST.decode(known, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert text == theirs


NOT_BYTES = [i for i in range(SENTENCEPIECE.vocab_size) if not 3 <= i < 259]


@given(st.lists(st.sampled_from(NOT_BYTES), max_size=30), st.booleans())
def test_sentencepiece_ids_equal_one_shot_decoding(ids: list[int], skip: bool) -> None:
    text = "".join(stream(SENTENCEPIECE, ids, skip_special_tokens=skip))
    assert text == SENTENCEPIECE.backend.decode(ids, skip_special_tokens=skip)


@given(st.binary(max_size=30))
def test_byte_tokens_decode_as_python_decodes_bytes(data: bytes) -> None:
    """`tokenizers` turns a whole run into U+FFFD if any byte of it is wrong; a stream cannot wait
    for the end.
    """
    ids = [3 + byte for byte in data]
    text = "".join(stream(SENTENCEPIECE, ids))
    assert text == SENTENCEPIECE.decode(ids) == data.decode("utf-8", "replace").removeprefix(" ")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return
    assert text == SENTENCEPIECE.backend.decode(ids)


@given(IDS, IDS, st.integers(1, 4))
def test_output_continues_the_prompt(prompt: list[int], ids: list[int], step: int) -> None:
    """Prompt and output make the same text wherever the border is, also in the middle of a
    character.
    """
    data = b"".join(BYTE_LEVEL.id_to_bytes(i) for i in prompt)
    whole = codecs.getincrementaldecoder("utf-8")("replace").decode(data)  # less an unfinished end
    out = "".join(stream(BYTE_LEVEL, ids, step, prompt=prompt, skip_special_tokens=False))
    assert whole + out == BYTE_LEVEL.decode([*prompt, *ids], skip_special_tokens=False)


def test_sentencepiece_keeps_the_space_after_a_prompt() -> None:
    ids = SENTENCEPIECE.encode("Hel", add_special_tokens=False)
    assert "".join(stream(SENTENCEPIECE, ids)) == "Hel"
    assert "".join(stream(SENTENCEPIECE, ids, prompt=[1])) == "Hel"  # only <s>: no text yet
    assert "".join(stream(SENTENCEPIECE, ids, prompt=[1, *ids])) == " Hel"


@KINDS
def test_a_character_comes_with_its_last_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert len(ids) > 4 and "😀" in pieces and "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


@KINDS
def test_an_unfinished_character_is_flushed_at_the_end_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    *pieces, last = stream(tokenizer, ids)
    assert "".join(pieces).lstrip() == "a" and last == "\ufffd"


def test_text_is_never_taken_back() -> None:
    ids = list(range(VOCAB_SIZE))
    whole = BYTE_LEVEL.decode(ids)
    for text in itertools.accumulate(stream(BYTE_LEVEL, ids)):
        assert whole.startswith(text)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Metaspace()])
def test_decoders_that_are_no_sum_over_tokens_are_refused(decoder: object) -> None:
    backend = train_tiny_tokenizer()
    backend.decoder = decoder  # type: ignore[assignment]
    with pytest.raises(LoadError, match="decoder"):
        _ = Tokenizer(TokenizerParts(backend, {})).pieces


def test_the_demo_model_streams_exactly(smollm2_gguf: Path) -> None:
    from jengine.loading.gguf_source import GGUFFile

    tokenizer = Tokenizer.from_gguf(GGUFFile(smollm2_gguf).metadata)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(stream(tokenizer, ids, skip_special_tokens=False)) == text
    ids = [(7919 * i) % tokenizer.vocab_size for i in range(3000)]
    assert "".join(stream(tokenizer, ids)) == tokenizer.backend.decode(ids)
