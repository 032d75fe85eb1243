"""Answers of the OpenAI API as plain dictionaries, and event-stream chunks from templates.

A chunk is assembled from encoded constants and the one string that changes: 0.2 us against 7 us
through a model class.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec

from jengine.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestOutput

IMPOSSIBLE = -9999.0  # JSON has no -inf
encode = msgspec.json.encode
TokenText = Callable[[int], str]
TokenBytes = Callable[[int], bytes]
Top = int | Collection[int]  # the best so many tokens, or these


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None) -> dict[str, Any]:
    """`cached_tokens` None leaves the details out."""
    result: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if cached_tokens is not None:
        result["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return result


class ChunkWriter:
    """Events of one stream. `id`, `created` and `model` are the same in all of them."""

    def __init__(self, object_name: str, response_id: str, model: str) -> None:
        self.created = int(time.time())
        head = {
            "id": response_id,
            "object": object_name,
            "created": self.created,
            "model": model,
        }
        self._prefix = b"data: " + encode(head)[:-1] + b',"choices":['
        self._plain: dict[int, tuple[bytes, bytes]] = {}

    def chat_text(self, index: int, text: str) -> bytes:
        """The common case: a piece of text and nothing else."""
        if index not in self._plain:
            before = self._prefix + b'{"index":' + encode(index) + b',"delta":{"content":'
            self._plain[index] = before, b'},"logprobs":null,"finish_reason":null}]}\n\n'
        before, after = self._plain[index]
        return before + encode(text) + after

    def completion_text(self, index: int, text: str) -> bytes:
        if index not in self._plain:
            before = self._prefix + b'{"index":' + encode(index) + b',"text":'
            after = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
            self._plain[index] = before, after
        before, after = self._plain[index]
        return before + encode(text) + after

    def choice(self, choice: dict[str, Any], usage_now: dict[str, Any] | None = None) -> bytes:
        """Anything else about one choice."""
        tail = b"]}\n\n" if usage_now is None else b'],"usage":' + encode(usage_now) + b"}\n\n"
        return self._prefix + encode(choice) + tail

    def usage(self, total: dict[str, Any]) -> bytes:
        """The chunk after all choices."""
        return self._prefix + b'],"usage":' + encode(total) + b"}\n\n"


def chat_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs],
    top: Top,
    text_of: TokenText,
    bytes_of: TokenBytes,
) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for token_id, position in zip(token_ids, positions, strict=True):
        entry = _chat_logprob(token_id, position[token_id], text_of, bytes_of)
        entry["top_logprobs"] = [
            _chat_logprob(other, value, text_of, bytes_of) for other, value in _shown(position, top)
        ]
        content.append(entry)
    return {"content": content}


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    top: Top,
    text_of: TokenText,
    offset: int,
) -> dict[str, Any]:
    """Parallel lists. `offset` is where the first token's text begins; a position without
    candidates is null.
    """
    result: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for token_id, position in zip(token_ids, positions, strict=True):
        token = text_of(token_id)
        result["tokens"].append(token)
        result["text_offset"].append(offset)
        offset += len(token)
        if position is None:
            result["token_logprobs"].append(None)
            result["top_logprobs"].append(None)
            continue
        result["token_logprobs"].append(_finite(position[token_id].logprob))
        # As vLLM: the chosen token is listed too when it is not among the best.
        shown = dict([*_shown(position, top), (token_id, position[token_id])])
        result["top_logprobs"].append(
            {text_of(other): _finite(value.logprob) for other, value in shown.items()}
        )
    return result


def prompt_logprobs(output: RequestOutput) -> list[dict[str, Any] | None] | None:
    """vLLM's extension: one object of {token id: {logprob, rank, decoded_token}} for each prompt
    token.
    """
    if output.prompt_logprobs is None:
        return None
    return [None if p is None else _prompt_position(p) for p in output.prompt_logprobs]


def stop_fields(completion: CompletionOutput) -> dict[str, Any]:
    return {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}


def _chat_logprob(
    token_id: int, value: Logprob, text_of: TokenText, bytes_of: TokenBytes
) -> dict[str, Any]:
    """`bytes` are the token's own: a piece of a character has no text to encode again."""
    return {
        "token": text_of(token_id),
        "logprob": _finite(value.logprob),
        "bytes": list(bytes_of(token_id)),
    }


def _prompt_position(position: PositionLogprobs) -> dict[str, Any]:
    return {
        str(token_id): {
            "logprob": _finite(value.logprob),
            "rank": value.rank,
            "decoded_token": value.decoded_token,
        }
        for token_id, value in position.items()
    }


def _shown(position: PositionLogprobs, top: Top) -> list[tuple[int, Logprob]]:
    ranked = sorted(position.items(), key=lambda item: item[1].rank or 0)
    if isinstance(top, int):
        return ranked[: None if top < 0 else top]
    return [item for item in ranked if item[0] in top]


def _finite(value: float) -> float:
    return max(value, IMPOSSIBLE)
