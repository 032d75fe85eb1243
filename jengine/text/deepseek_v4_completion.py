"""What DeepSeek-V4 says, taken apart: reasoning, answer, calls of tools."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jengine.text.deepseek_v4_chat import DSML, END_THINK, EOS, SEPARATOR, THINK, to_json

BEGIN, END = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"
INVOKE = re.compile(rf'<{DSML}invoke name="([^"]*)">\n(.*?)\n</{DSML}invoke>\n?', re.S)
PARAMETER = re.compile(
    rf'<{DSML}parameter name="([^"]*)" string="(true|false)">(.*?)</{DSML}parameter>\n?', re.S
)


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True)
class Completion:
    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


def parse_completion(text: str, *, is_thinking: bool) -> Completion:
    """Of a whole completion, with or without the end of its message. Raises `ValueError` that says
    what is not as the model was taught to write it."""
    text = text.removesuffix(EOS)
    if EOS in text:
        raise ValueError("text after the end of the message")
    reasoning = ""
    if is_thinking:
        reasoning, found, text = text.removeprefix(THINK).partition(END_THINK)
        if not found:
            raise ValueError(f"reasoning without {END_THINK}")
    if THINK in text or END_THINK in text:
        raise ValueError("reasoning where there should be none")
    content, found, block = text.partition(BEGIN)
    if not found:
        return Completion(reasoning, content)
    block, found, rest = block.partition(END)
    if not found:
        raise ValueError(f"tool calls without {END}")
    if rest:
        raise ValueError("text after the tool calls")
    return Completion(reasoning, content.removesuffix(SEPARATOR), parse_calls(block))


def parse_calls(block: str) -> tuple[ToolCall, ...]:
    """Of what stands between the tags of the block."""
    calls = []
    at = 1 if block.startswith("\n") else 0
    while at < len(block):
        match = INVOKE.match(block, at)
        if match is None:
            raise ValueError(f"no tool call: {block[at : at + 60]!r}")
        calls.append(ToolCall(match[1], _parse_arguments(match[2])))
        at = match.end()
    if not calls:
        raise ValueError("a block of tool calls without any")
    return tuple(calls)


def _parse_arguments(body: str) -> str:
    pairs: dict[str, str] = {}
    at = 0
    while at < len(body):
        match = PARAMETER.match(body, at)
        if match is None:
            raise ValueError(f"no parameter: {body[at : at + 60]!r}")
        name, is_string, value = match.groups()
        add_parameter(pairs, name, value, is_string=is_string == "true")
        at = match.end()
    return join_parameters(pairs)


def add_parameter(pairs: dict[str, str], name: str, value: str, *, is_string: bool) -> None:
    """To `pairs` of names and JSON. Raises `ValueError`."""
    if name in pairs:
        raise ValueError(f"parameter {name!r} is given twice")
    if is_string:
        value = to_json(value)
    else:
        try:
            json.loads(value, parse_constant=_refuse)
        except RecursionError:
            raise ValueError(f"parameter {name!r} is nested too deeply") from None
    pairs[name] = value


def join_parameters(pairs: Mapping[str, str]) -> str:
    """A JSON object."""
    return "{" + ", ".join(f"{to_json(name)}: {value}" for name, value in pairs.items()) + "}"


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")
