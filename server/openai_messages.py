"""An assistant's message as the chat API shows it: the model's text, with reasoning and calls of
tools apart where the server was told how the model writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jengine.server.openai_protocol import ChatRequest
from jengine.server.settings import ServerSettings
from jengine.server.state import new_request_id
from jengine.text.deepseek_v4_chat import THINK
from jengine.text.deepseek_v4_completion import Completion
from jengine.text.deepseek_v4_stream import CompletionParser


@dataclass(frozen=True, slots=True)
class MessageFormat:
    """How the completions of one request are to be read."""

    is_thinking: bool  # they begin with reasoning
    takes_calls: bool
    shows_reasoning: bool = True
    max_calls: int | None = None

    @property
    def is_plain(self) -> bool:
        return not self.is_thinking and not self.takes_calls

    def writer(self) -> MessageWriter:
        """For one choice."""
        return MessageWriter(self)


def message_format(
    settings: ServerSettings, body: ChatRequest, prompt: str, *, is_constrained: bool
) -> MessageFormat:
    """What the model was shown decides whether it thinks. A constraint describes all that it
    writes, so there is no reasoning before that.
    """
    is_thinking = prompt.rstrip().endswith(THINK) and not is_constrained
    return MessageFormat(
        is_thinking=is_thinking and settings.reasoning_parser is not None,
        takes_calls=body.may_call,
        shows_reasoning=body.include_reasoning,
        max_calls=1 if body.parallel_tool_calls is False else None,
    )


class MessageWriter:
    """The message of one choice, whole or in deltas."""

    def __init__(self, form: MessageFormat) -> None:
        self._form = form
        self._parser: CompletionParser | None = None
        if not form.is_plain:
            self._parser = CompletionParser(
                is_thinking=form.is_thinking, takes_calls=form.takes_calls
            )
        self._num_calls = 0

    def whole(self, text: str, before: str = "") -> dict[str, Any]:
        """The message's fields but for its role. `before` stands before the answer."""
        if self._parser is None:
            return {"content": before + text}
        parsed = self._parser.feed(text, is_last=True)
        calls = [
            {"id": _call_id(), "type": "function", "function": _function(name, arguments)}
            for _, name, arguments in self._numbered(parsed)
        ]
        content = before + parsed.content
        is_other = calls or parsed.reasoning
        return {
            "content": content or (None if is_other else ""),
            **self._reasoning(parsed),
            **({"tool_calls": calls} if calls else {}),
        }

    def deltas(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """What `text` adds to the message. A call is begun by a delta with its id and name."""
        if self._parser is None:
            return [{"content": text}] if text else []
        parsed = self._parser.feed(text, is_last=is_last)
        deltas: list[dict[str, Any]] = []
        if reasoning := self._reasoning(parsed):
            deltas.append(reasoning)
        if parsed.content:
            deltas.append({"content": parsed.content})
        for index, name, arguments in self._numbered(parsed):
            begin = {"id": _call_id(), "type": "function", "function": _function(name, "")}
            deltas.append({"tool_calls": [{"index": index, **begin}]})
            piece = {"index": index, "function": {"arguments": arguments}}
            deltas.append({"tool_calls": [piece]})
        return deltas

    def finish_reason(self, reason: str | None) -> str | None:
        """After the text. Calls that came before an end for another reason are calls, too, but the
        client is told that there might have been more.
        """
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    def _numbered(self, parsed: Completion) -> list[tuple[int, str, str]]:
        first = self._num_calls
        calls = parsed.tool_calls
        if (most := self._form.max_calls) is not None:
            calls = calls[: most - first]
        self._num_calls += len(calls)
        return [(first + i, call.name, call.arguments) for i, call in enumerate(calls)]

    def _reasoning(self, parsed: Completion) -> dict[str, str]:
        """Under both names: vLLM's, and the one of DeepSeek's own API."""
        if not parsed.reasoning or not self._form.shows_reasoning:
            return {}
        return {"reasoning": parsed.reasoning, "reasoning_content": parsed.reasoning}


def _call_id() -> str:
    return new_request_id("call_")


def _function(name: str, arguments: str) -> dict[str, str]:
    return {"name": name, "arguments": arguments}
