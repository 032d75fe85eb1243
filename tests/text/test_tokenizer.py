"""Tokenizers from folders against transformers, from GGUF metadata against llama.cpp and known
relatives.
"""

import json
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from jengine.errors import InvalidRequestError, LoadError
from jengine.loading.gguf_source import GGUFFile
from jengine.text.tokenizer import Tokenizer
from tests.oracles.gguf_files import tokenizer_metadata
from tests.oracles.tiny_llama import (
    BOS,
    CHAT_TEMPLATE,
    CORPUS,
    EOS,
    PAD,
    save_tiny_tokenizer,
    train_tiny_tokenizer,
)

TEXTS = [*CORPUS, "", " ", f"a{EOS}b <|im_start|", "1234567", "\x00 \u2028\ufeff", "e\u0301 é"]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CONTROL, USER_DEFINED = 3, 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_tokenizer(tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")


def assert_equals_transformers(folder: Path) -> Tokenizer:
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids, special) == theirs.decode(
                ids, skip_special_tokens=special, clean_up_tokenization_spaces=False
            )
    assert ours.vocab_size == len(theirs)
    added = theirs.added_tokens_decoder
    assert ours.all_special_ids == sorted(i for i, token in added.items() if token.special)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    return ours


def test_folder_equals_transformers(folder: Path) -> None:
    ours = assert_equals_transformers(folder)
    assert (ours.pad_token_id, ours.bos_token_id, ours.eos_token_id) == (0, 1, 2)
    assert ours.chat_template == CHAT_TEMPLATE


def test_special_tokens_written_as_objects(folder: Path) -> None:
    token = {
        "content": EOS,
        "lstrip": False,
        "normalized": False,
        "special": True,
        "__type": "AddedToken",
    }
    edit(folder / "tokenizer_config.json", eos_token=token, pad_token=None)
    ours = assert_equals_transformers(folder)
    assert (ours.eos_token_id, ours.pad_token_id) == (2, None)


def test_bos_and_eos_are_added_as_tokenizer_json_says(folder: Path) -> None:
    backend = train_tiny_tokenizer()
    backend.post_processor = TemplateProcessing(
        single=[BOS, "$A", EOS], special_tokens=[(BOS, 1), (EOS, 2)]
    )
    backend.save(str(folder / "tokenizer.json"))
    # Left over from tokenizers without a tokenizer.json, and as in transformers of no effect with
    # one.
    edit(folder / "tokenizer_config.json", add_bos_token=False, add_eos_token=False)
    ours = assert_equals_transformers(folder)
    ids = ours.encode("x")
    assert ids[0] == 1 and ids[-1] == 2
    assert ours.encode("x", add_special_tokens=False) == ids[1:-1]


def test_tokens_that_only_the_config_knows(folder: Path) -> None:
    size = train_tiny_tokenizer().get_vocab_size()
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    decoder = {
        str(size + 1): {"content": "<|eot|>", "special": True, **plain},
        str(size): {"content": "<think>", "special": False, **plain},
    }
    edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    ours = assert_equals_transformers(folder)
    assert ours.encode("a<think><|eot|>")[-2:] == [size, size + 1]
    assert ours.decode([size, size + 1]) == "<think>"


def test_truncation_and_padding_left_from_training_are_ignored(folder: Path) -> None:
    backend = train_tiny_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(folder / "tokenizer.json"))
    ours = Tokenizer.from_folder(folder)
    assert (
        ours.encode("The quick brown fox")
        == train_tiny_tokenizer().encode("The quick brown fox").ids
    )


def test_templates_from_every_place(folder: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    tool = [{"type": "function", "function": {"name": "f"}}]
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.apply_chat_template(MESSAGES) == "D"
    assert tokenizer.apply_chat_template(MESSAGES, tools=tool) == "T"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="tool_use") == "T"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="{{ bos_token }}") == BOS
    (folder / "chat_template.jinja").write_text("J")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_template == "J"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="rag") == "R"
    edit(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequestError, match="must name one of rag"):
        Tokenizer.from_folder(folder).apply_chat_template(MESSAGES)


def test_a_model_without_a_template_says_so(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template=None)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_template is None
    with pytest.raises(InvalidRequestError, match="this model has no chat template") as caught:
        tokenizer.apply_chat_template(MESSAGES)
    assert caught.value.field == "messages"


def test_saved_folders_are_read_by_transformers(folder: Path, tmp_path: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    Tokenizer.from_folder(folder).save(tmp_path / "saved")
    again = assert_equals_transformers(tmp_path / "saved")
    assert again.templates == {"default": CHAT_TEMPLATE, "rag": "R"}
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    ) == again.apply_chat_template(MESSAGES)


def test_damaged_files_are_refused(folder: Path) -> None:
    for content in ("{", "{}", '{"model": {"type": "nonsense"}}'):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(LoadError, match=r"tokenizer\.json is not a tokenizer that can be read"):
            Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LoadError, match=r"holds no tokenizer\.json"):
        Tokenizer.from_folder(folder)


def test_single_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode(f"世 the{EOS}", add_special_tokens=False)
    assert b"".join(map(tokenizer.id_to_bytes, ids)).decode() == f"世 the{EOS}"
    assert tokenizer.id_to_token(2) == EOS
    first = tokenizer.encode("😁", add_special_tokens=False)[0]
    assert tokenizer.id_to_token(first) == "\ufffd"  # some of its four bytes
    for outside in (-1, 10**6):
        assert tokenizer.id_to_token(outside) == "" and tokenizer.id_to_bytes(outside) == b""
        assert tokenizer.decode([outside]) == ""


def test_lone_surrogates_become_the_replacement_character(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"  # a pair is a character


# --- GGUF ----------------------------------------------------------------------------------------


def test_demo_model_equals_llama_cpp(smollm2_gguf: Path) -> None:
    """smollm2_ids.json holds the ids llama.cpp (2026-10) gives for the same file, special tokens
    parsed.
    """
    tokenizer = Tokenizer.from_gguf(GGUFFile(smollm2_gguf).metadata)
    cases = json.loads((Path(__file__).parent / "smollm2_ids.json").read_text())
    assert len(cases) > 90
    for text, ids in cases:
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.all_special_ids == list(range(17))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_saved_gguf_tokenizer_is_read_by_transformers(smollm2_gguf: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(GGUFFile(smollm2_gguf).metadata)
    tokenizer.save(tmp_path)
    again = assert_equals_transformers(tmp_path)
    assert again.encode("Hello 123") == tokenizer.encode("Hello 123")


SPLITS = {  # how the model's own tokenizer.json says it
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def train(pre_tokenizer: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, "11 222 3333 123456 'S 'll\n\n \n  x"] * 2, trainer)
    return backend


def metadata_of(backend: tokenizers.Tokenizer, **changes: Any) -> dict[str, Any]:
    vocab = backend.get_vocab()
    merges = json.loads(backend.model.__getstate__())["merges"]
    return {
        **tokenizer_metadata(),
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [1] * (len(vocab) - 3),
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        **changes,
    }


TRAINED = {name: train(split) for name, split in SPLITS.items()}


@pytest.mark.parametrize("pre", SPLITS)
def test_pre_tokenizers_equal_the_models_own(pre: str) -> None:
    reference = TRAINED[pre]
    if pre == "qwen2":
        reference.normalizer = normalizers.NFC()
    if pre == "llama-bpe":
        reference.model.ignore_merges = True
    add_bos = {"tokenizer.ggml.add_bos_token": False}
    ours = Tokenizer.from_gguf(metadata_of(reference, **{"tokenizer.ggml.pre": pre, **add_bos}))

    @given(st.text(st.sampled_from("aT's'S 12345\n\t\r.,é世😀½\u0301_-<>"), max_size=40))
    def check(text: str) -> None:
        assert ours.encode(text) == reference.encode(text).ids

    check()
    for text in TEXTS:
        assert ours.encode(text) == reference.encode(text).ids


def test_the_kinds_of_splitting_differ() -> None:
    """Else the test above could not tell them apart."""
    text = "It'S 123456\n\n x"
    words = [tuple(word for word, _ in split.pre_tokenize_str(text)) for split in SPLITS.values()]
    assert len(set(words)) == len(SPLITS)


def test_flags_and_token_types() -> None:
    backend = TRAINED["llama-bpe"]
    vocab = backend.get_vocab()
    tokens = [*sorted(vocab, key=vocab.__getitem__), "<think>", "[X] "]
    types = [CONTROL] * 3 + [1] * (len(vocab) - 3) + [USER_DEFINED, USER_DEFINED]
    changes = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.add_bos_token": None,  # llama-bpe adds it unless told not to
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.unknown_token_id": 2**32 - 1,
    }
    metadata = {k: v for k, v in metadata_of(backend, **changes).items() if v is not None}
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode("a<think>[X] b")
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids[2:4] == [len(vocab), len(vocab) + 1]
    assert (
        tokenizer.decode(ids) == "a<think>[X] b"
    )  # user-defined tokens are text, control tokens are not
    assert tokenizer.all_special_ids == [0, 1, 2]


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """Scores as SentencePiece writes them: the better the merge, the higher."""
    words = ["▁t", "he", "▁the", "in", "▁in", "▁▁", "▁▁▁▁", "世界"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzT.,世界"]
    types = [2, CONTROL, CONTROL] + [6] * 256 + [1] * (len(pieces) - 259)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(max(0, i - 258)) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **changes,
    }


def sentencepiece_oracle(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """The algorithm as published: always join the neighbours whose union scores highest."""
    index = {piece: i for i, piece in enumerate(pieces)}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [
            (scores[index[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in index
        ]
        if not joined:
            break
        i = -max(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids: list[int] = []
    for part in parts:
        ids += [index[part]] if part in index else [3 + byte for byte in part.encode()]
    return ids


@given(st.text(st.sampled_from("theinabc  T.世界é😀\n"), max_size=30))
def test_sentencepiece_merges_by_score(text: str) -> None:
    metadata = sentencepiece_metadata()
    ids = SENTENCEPIECE.encode(text, add_special_tokens=False)
    assert ids == sentencepiece_oracle(
        text, metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    )
    assert SENTENCEPIECE.decode(ids) == text


SENTENCEPIECE = Tokenizer.from_gguf(sentencepiece_metadata())


def test_sentencepiece_flags() -> None:
    assert SENTENCEPIECE.encode("the")[0] == 1  # bos by default
    assert SENTENCEPIECE.all_special_ids == [0, 1, 2]
    bare = Tokenizer.from_gguf(sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": False}))
    ids = bare.encode("the", add_special_tokens=False)
    assert not any("▁" in (bare.backend.id_to_token(i) or "") for i in ids)
    assert bare.decode(bare.encode(" the")) == " the"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "GGUF tokenizer 't5' is not supported"),
        ({"tokenizer.ggml.tokens": None}, "is not supported"),
        ({"tokenizer.ggml.scores": None}, "has no 'tokenizer.ggml.scores'"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "holds token 'a' twice"),
        (
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "exotic"},
            "pre-tokenizer 'exotic' is not supported; known: default",
        ),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    metadata = {k: v for k, v in sentencepiece_metadata(**changes).items() if v is not None}
    with pytest.raises(LoadError, match=message):
        Tokenizer.from_gguf(metadata)


def test_named_templates_in_gguf() -> None:
    metadata = {**tokenizer_metadata(), "tokenizer.chat_template.tool_use": "T"}
    assert Tokenizer.from_gguf(metadata).templates == {"default": CHAT_TEMPLATE, "tool_use": "T"}


def test_long_texts_do_not_hold_the_interpreter_lock(folder: Path) -> None:
    """One million characters would stop every stream of a server for seconds."""
    tokenizer = Tokenizer.from_folder(folder)
    text = "a b " * 100_000
    num_turns, is_over = 0, threading.Event()

    def count() -> None:
        nonlocal num_turns
        while not is_over.wait(0.001):
            num_turns += 1

    thread = threading.Thread(target=count)
    thread.start()
    ids = tokenizer.encode(text)
    is_over.set()
    turns = num_turns
    thread.join()
    assert turns >= 5  # one or two, if the thread had to wait for the lock
    assert ids == tokenizer.backend.encode(text).ids
