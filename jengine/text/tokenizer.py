"""Text to token ids and back, on the `tokenizers` library. `transformers` is the oracle of the
tests, never imported.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from jengine.errors import InvalidRequestError, LoadError
from jengine.text import deepseek_v4_chat
from jengine.text.chat_template import render_chat
from jengine.text.gguf_tokenizer import build_from_gguf
from jengine.text.pieces import TokenPieces

SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
# Only the library's methods for batches release the interpreter lock: one million characters would
# stop every stream of a server for seconds. For short texts they are slower.
LONG_CHARS = 2048
DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
# By `model_type`: what renders conversations of models that come without a template.
CHAT_ENCODERS: Mapping[str, Callable[..., str]] = {"deepseek_v4": deepseek_v4_chat.render_chat}


@dataclass(frozen=True)
class TokenizerParts:
    """What a tokenizer is made of. `templates` are chat templates by name."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]  # of SPECIAL_NAMES
    templates: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # the rest of tokenizer_config.json
    model_type: str = ""  # of config.json beside it


class Tokenizer:
    """Immutable after construction and safe to share between threads."""

    def __init__(self, parts: TokenizerParts) -> None:
        self.backend = parts.backend
        self.special_tokens = dict(parts.special_tokens)
        self.templates = dict(parts.templates)
        self._config = parts.config
        self._chat_encoder = CHAT_ENCODERS.get(parts.model_type)
        self.vocab_size = parts.backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.pad_token_id = self._special_id("pad_token")
        named = {parts.backend.token_to_id(token) for token in self.special_tokens.values()}
        added = parts.backend.get_added_tokens_decoder()
        self.all_special_ids = sorted(
            {i for i, token in added.items() if token.special} | {i for i in named if i is not None}
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read tokenizer.json and its companions from a Hugging Face folder."""
        return cls(_parts_of_folder(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """Build from a GGUF file's `tokenizer.*` metadata."""
        backend, special_tokens = build_from_gguf(metadata)
        prefix = "tokenizer.chat_template"
        templates = {
            DEFAULT_TEMPLATE if key == prefix else key.removeprefix(prefix + "."): value
            for key, value in metadata.items()
            if (key == prefix or key.startswith(prefix + ".")) and isinstance(value, str)
        }
        return cls(TokenizerParts(backend, special_tokens, templates))

    @property
    def chat_template(self) -> str | None:
        return self.templates.get(DEFAULT_TEMPLATE)

    @cached_property
    def pieces(self) -> TokenPieces:
        """Bytes of every token; built on first use (0.1 s for 128k tokens)."""
        return TokenPieces(self.backend, self.all_special_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens written out in the text become the special tokens, as with
        Hugging Face.
        """
        if len(text) > LONG_CHARS:
            batch = self.backend.encode_batch_fast(
                [_encodable(text)], add_special_tokens=add_special_tokens
            )
            return batch[0].ids
        return self.backend.encode(_encodable(text), add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; the same as everything an `IncrementalDetokenizer` without a prompt
        gives. Ids outside the vocabulary have no text.
        """
        return self.pieces.decode(ids, skip_special_tokens)

    def id_to_token(self, i: int) -> str:
        """Display string of a single token; U+FFFD stands for bytes that are no whole character."""
        return self.pieces.bytes_of(i).decode("utf-8", errors="replace")

    def id_to_bytes(self, i: int) -> bytes:
        """What a single token adds to the text, in UTF-8; empty outside the vocabulary."""
        return self.pieces.bytes_of(i)

    def apply_chat_template(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation, special tokens included: encode it with
        `add_special_tokens=False`.

        `chat_template` is a template or the name of one of the model's. `kwargs` become template
        variables.
        """
        options: dict[str, Any] = dict(
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens, **kwargs},
        )
        if chat_template is None and not self.templates and self._chat_encoder is not None:
            return self._chat_encoder(messages, **options)
        return render_chat(self._choose_template(chat_template, tools), messages, **options)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face tokenizer folder, also if the tokenizer came from a GGUF file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / TOKENIZER_FILE))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._config,
            **self.special_tokens,
        }
        if (default := self.chat_template) is not None:
            (folder / TEMPLATE_FILE).write_text(default, "utf-8")
            config["chat_template"] = default  # readers older than the .jinja file look here
        for name, template in self.templates.items():
            if name != DEFAULT_TEMPLATE:
                (folder / TEMPLATE_FOLDER).mkdir(exist_ok=True)
                (folder / TEMPLATE_FOLDER / f"{name}.jinja").write_text(template, "utf-8")
        text = json.dumps(config, ensure_ascii=False, indent=2)
        (folder / CONFIG_FILE).write_text(text, "utf-8")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def _choose_template(self, asked: str | None, tools: Sequence[Any] | None) -> str:
        if asked is not None:
            return self.templates.get(asked, asked)
        if tools and TOOL_TEMPLATE in self.templates:
            return self.templates[TOOL_TEMPLATE]
        if DEFAULT_TEMPLATE in self.templates:
            return self.templates[DEFAULT_TEMPLATE]
        if self.templates:
            raise InvalidRequestError(
                "chat_template", f"must name one of {', '.join(sorted(self.templates))}"
            )
        raise InvalidRequestError(
            "messages",
            "this model has no chat template: send a plain prompt, or give a chat_template",
        )


def _encodable(text: str) -> str:
    """Lone surrogates (JSON's "\\ud800" makes them) are no text: they become U+FFFD, as in a
    browser.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parts_of_folder(folder: Path) -> TokenizerParts:
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise LoadError(
            f"{folder} holds no {TOKENIZER_FILE}; name another tokenizer, "
            "or start with skip_tokenizer_init"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error}") from error
    except Exception as error:  # `tokenizers` raises nothing more specific for a malformed file
        raise LoadError(f"{file} is not a tokenizer that can be read: {error}") from error
    # Baked-in training settings: they would cut long prompts or fill short ones up.
    backend.no_truncation()
    backend.no_padding()
    config = _read_object(folder / CONFIG_FILE)
    special_map = _read_object(folder / "special_tokens_map.json")
    specials = {
        name: token
        for name in SPECIAL_NAMES
        if (token := _content(config.get(name)) or _content(special_map.get(name))) is not None
    }
    _add_tokens(backend, config.get("added_tokens_decoder") or {}, specials.values())
    return TokenizerParts(
        backend=backend,
        special_tokens=specials,
        templates=_templates_of_folder(folder, config),
        config={k: v for k, v in config.items() if k not in ("chat_template", *SPECIAL_NAMES)},
        model_type=str(_read_object(folder / "config.json").get("model_type") or ""),
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what `Tokenizer.from_folder` reads."""
    (folder / TOKENIZER_FILE).write_text(tokenizer.backend.to_str(), "utf-8")
    templates = [{"name": k, "template": v} for k, v in tokenizer.templates.items()]
    config = {**tokenizer.special_tokens, "chat_template": templates}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), "utf-8")


def _templates_of_folder(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. Files take precedence over tokenizer_config.json, as with Hugging
    Face.
    """
    inline = config.get("chat_template")
    if isinstance(inline, str):
        templates = {DEFAULT_TEMPLATE: inline}
    else:
        templates = {entry["name"]: entry["template"] for entry in inline or ()}
    if (file := folder / TEMPLATE_FILE).is_file():
        templates[DEFAULT_TEMPLATE] = file.read_text("utf-8")
    for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        templates[file.stem] = file.read_text("utf-8")
    return templates


def _content(token: str | Mapping[str, Any] | None) -> str | None:
    """A special token is written as a string, or as an object with its flags."""
    return token.get("content") if isinstance(token, Mapping) else token


def _add_tokens(
    backend: tokenizers.Tokenizer, decoder: Mapping[str, Mapping[str, Any]], specials: Iterable[str]
) -> None:
    """Tokens that only tokenizer_config.json knows, in order of their ids."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for _, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        if (content := entry["content"]) not in known:
            known.add(content)
            backend.add_tokens(
                [
                    tokenizers.AddedToken(
                        content, **{name: bool(entry.get(name, False)) for name in flags}
                    )
                ]
            )
    missing = [
        tokenizers.AddedToken(token, normalized=False, special=True)
        for token in specials
        if token not in known
    ]
    backend.add_special_tokens(missing)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} does not hold a JSON object")
    return value
