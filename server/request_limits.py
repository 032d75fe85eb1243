"""How much one request may say, over any protocol: what is cheap to send and dear to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jengine.errors import InvalidRequestError
from jengine.request import SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_BAD_WORDS = 128
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_CACHE_SALT = 1024
# Arguments of the renderer itself; letting a request set them has let requests block servers
# (CVE-2025-62426).
RESERVED_TEMPLATE_NAMES = frozenset(
    {"messages", "tools", "tokenize", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "documents"}
)


def check_sizes(sampling: SamplingParams, cache_salt: str, vocab_size: int) -> None:
    """Raise `InvalidRequestError` for what the event loop would spend long on."""
    for name, texts, most in (
        ("stop", sampling.stop_strings, MAX_STOP_STRINGS),
        ("bad_words", sampling.bad_words or (), MAX_BAD_WORDS),
    ):
        if len(texts) > most or any(len(text) > MAX_STOP_LENGTH for text in texts):
            raise InvalidRequestError(
                name, f"at most {most} strings of {MAX_STOP_LENGTH} characters"
            )
    for name, items, most in (
        ("stop_token_ids", sampling.stop_token_ids or (), MAX_STOP_TOKEN_IDS),
        ("allowed_token_ids", sampling.allowed_token_ids or (), vocab_size),
        ("logit_bias", sampling.logit_bias or (), MAX_LOGIT_BIAS),
    ):
        if len(items) > most:
            raise InvalidRequestError(name, f"at most {most} entries, got {len(items)}")
    for value in (sampling.logit_bias or {}).values():
        if not -100.0 <= value <= 100.0:
            raise InvalidRequestError("logit_bias", f"must be in [-100, 100], got {value}")
    if len(cache_salt) > MAX_CACHE_SALT:
        raise InvalidRequestError("cache_salt", f"at most {MAX_CACHE_SALT} characters")


def check_template_variables(field: str, variables: Mapping[str, Any] | None) -> None:
    """Refuse names that mean something to the renderer."""
    reserved = RESERVED_TEMPLATE_NAMES.intersection(variables or ())
    if reserved:
        raise InvalidRequestError(field, f"may not set {', '.join(sorted(reserved))}")
