"""Conversations as clients send them (OpenAI's form), brought into the form that chat templates
read.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jengine.errors import InvalidRequestError

CONTENT = "content"
TEXT_OF_PART = {"text": "text", "refusal": "refusal"}  # type of a content part -> where its text is
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
PART_SEPARATOR = "\n"  # between the texts of one message, as in vLLM


def normalise_messages(messages: Any, *, takes_parts: bool) -> list[dict[str, Any]]:
    """Validated deep copies. Keys that are null count as absent: templates would print "None".

    A list of content parts stays a list for templates that loop over it (`takes_parts`), and
    becomes one string for the others. Arguments of tool calls, JSON in a string at OpenAI, become
    the object templates expect.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequestError("messages", "must be a list of messages")
    if not messages:
        raise InvalidRequestError("messages", "must hold at least one message")
    return [
        _normalise(message, f"messages[{i}]", takes_parts) for i, message in enumerate(messages)
    ]


def normalise_tools(tools: Any) -> list[Any] | None:
    """Validated deep copy of a list of tool definitions; an empty list counts as none given."""
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidRequestError("tools", "must be a list of tool definitions")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequestError(
                "tools", f"[{i}] must be an object, got {type(tool).__name__}"
            )
    return _plain(tools, "tools") or None


def _normalise(message: Any, where: str, takes_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            "messages", f"{where} must be an object, got {type(message).__name__}"
        )
    copy = {key: _plain(value, where) for key, value in message.items() if value is not None}
    role = copy.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError("messages", f"{where}.role must be a non-empty string")
    if CONTENT in copy:
        copy[CONTENT] = _normalise_content(copy[CONTENT], f"{where}.content", takes_parts)
    if "tool_calls" in copy:
        copy["tool_calls"] = _normalise_calls(copy["tool_calls"], f"{where}.tool_calls")
    # One name reaches every template: gpt-oss reads `thinking`, the others `reasoning_content`.
    reasoning = next((copy[name] for name in REASONING_NAMES if name in copy), None)
    if reasoning is not None:
        copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
    return copy


def _normalise_content(content: Any, where: str, takes_parts: bool) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError("messages", f"{where} must be a string, a list of parts or null")
    parts = []
    for i, part in enumerate(content):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_OF_PART:
            raise InvalidRequestError(
                "messages", f"{where}[{i}] has type {kind!r}; supported: text"
            )
        if not isinstance(text := part.get(TEXT_OF_PART[kind]), str):
            raise InvalidRequestError(
                "messages", f"{where}[{i}].{TEXT_OF_PART[kind]} must be a string"
            )
        parts.append({"type": "text", "text": text})
    return parts if takes_parts else PART_SEPARATOR.join(part["text"] for part in parts)


def _normalise_calls(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InvalidRequestError("messages", f"{where} must be a list of objects")
    for i, call in enumerate(calls):
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
            continue
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except ValueError as error:
            raise InvalidRequestError(
                "messages", f"{where}[{i}].function.arguments is no JSON: {error}"
            ) from None
    return calls


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON's types only: objects with methods have no business in a template."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item, where) for item in value]
    raise InvalidRequestError(
        where.partition("[")[0], f"{where} holds a {type(value).__name__}, which JSON has not"
    )
