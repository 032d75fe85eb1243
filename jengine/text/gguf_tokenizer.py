"""A `tokenizers` tokenizer from GGUF metadata, equal to the one the model was trained with.

Two kinds: "gpt2" (byte-level BPE with merges; `tokenizer.ggml.pre` says how text is split first)
and "llama" (SentencePiece BPE with scores and byte fallback). Token types follow llama.cpp's
llama_token_type.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from jengine.errors import LoadError
from jengine.text.pieces import SPM_SPACE

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGITS = r"\p{N}"  # every digit alone
# llama.cpp's fallback for files older than `tokenizer.ggml.pre`
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)

# `tokenizer.ggml.pre` -> regular expressions that cut the text, one after the other
SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (_DIGITS, _GPT2)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), (_LLAMA3,)
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
}
# Whole words that are in the vocabulary are taken without merging, and bos is added unless the file
# says no.
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3")
_NFC_NAMES = (
    "qwen2",
    "deepseek-r1-qwen",
)  # their own tokenizers compose characters; llama.cpp leaves this out

# The other control tokens of Phi-3 swallow the white space after them: its chat template sets line
# feeds there. The file does not say; llama.cpp knows it by name, too.
_PHI3_KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")

_SPECIAL_KEYS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def build_from_gguf(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """(tokenizer, special tokens by Hugging Face's names). Raises `LoadError` naming what is
    missing or unknown.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise LoadError(f"GGUF tokenizer {kind!r} is not supported; known: gpt2, llama")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise LoadError(f"the GGUF vocabulary holds token {twice!r} twice")
    specials = {}
    for name, key in _SPECIAL_KEYS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and 0 <= token_id < len(
            tokens
        ):  # some converters write 2**32 - 1 for "none"
            specials[name] = tokens[token_id]
    build = _build_byte_level if kind == "gpt2" else _build_sentencepiece
    backend = build(metadata, vocab, specials)
    types = metadata.get("tokenizer.ggml.token_type") or ()
    is_phi3 = kind == "llama" and metadata.get("general.architecture") == "phi3"
    strips = {token for token in tokens if is_phi3 and token not in _PHI3_KEEP_SPACE}
    _add_tokens(backend, tokens, types, strips)
    _add_bos_eos(backend, metadata, specials)
    return backend, specials


def _build_byte_level(
    metadata: Mapping[str, Any], vocab: dict[str, int], specials: Mapping[str, str]
) -> tokenizers.Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise LoadError(f"GGUF pre-tokenizer {pre!r} is not supported; known: {', '.join(SPLITS)}")
    merges = [_split_merge(merge) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    backend = tokenizers.Tokenizer(BPE(vocab, merges, ignore_merges=pre in _LLAMA3_NAMES))
    if pre in _NFC_NAMES:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _build_sentencepiece(
    metadata: Mapping[str, Any], vocab: dict[str, int], specials: Mapping[str, str]
) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocab):
        raise LoadError(
            "the GGUF file has no 'tokenizer.ggml.scores' for each token, which model 'llama' needs"
        )
    backend = tokenizers.Tokenizer(
        BPE(
            vocab,
            _merges_of(vocab, scores),
            unk_token=specials.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPM_SPACE)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPM_SPACE), spaces] if has_prefix else [spaces]
    )
    steps = [decoders.Replace(SPM_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps
    )
    return backend


def _split_merge(merge: str) -> tuple[str, str]:
    """ "Ġ t" -> ("Ġ", "t"). The first part may itself be a space, never the empty string."""
    cut = merge.find(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _merges_of(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result scores highest; as a list in that order. Equal
    scores: lower ids of the parts first, as in Hugging Face's conversion.
    """
    found = []
    for token, i in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[i], vocab[left], vocab[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_tokens(
    backend: tokenizers.Tokenizer,
    tokens: Sequence[str],
    types: Sequence[int],
    strips: Container[str],
) -> None:
    """Control tokens are special, and those in `strips` take the white space after them along;
    user-defined ones are matched whole in the text, but are text themselves.
    """
    special, plain = [], []
    for token, kind in zip(tokens, types, strict=False):
        if kind in (CONTROL, UNKNOWN):
            rstrip = token in strips
            special.append(AddedToken(token, normalized=False, special=True, rstrip=rstrip))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _add_bos_eos(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], specials: Mapping[str, str]
) -> None:
    bos_by_default = (
        metadata["tokenizer.ggml.model"] == "llama"
        or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    )
    adds = {
        "bos_token": metadata.get("tokenizer.ggml.add_bos_token", bos_by_default),
        "eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    added = {name: token for name, token in specials.items() if adds.get(name)}
    if added:
        bos, eos = added.get("bos_token"), added.get("eos_token")
        backend.post_processor = TemplateProcessing(
            single=[*filter(None, [bos]), "$A", *filter(None, [eos])],
            special_tokens=[(token, backend.token_to_id(token)) for token in set(added.values())],
        )
