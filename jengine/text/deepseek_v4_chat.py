"""Conversations for DeepSeek-V4, byte for byte as its own encoder writes them: the checkpoints come
without a Jinja template (`encoding_dsv4` of the preview releases).

A prompt is for one of two modes: with thinking the assistant's turn opens with <think>, without it
with </think>. Reasoning of earlier turns is dropped, unless there are tools.
"""

# ruff: noqa: RUF001  (the model's bars are full-width ones)
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jengine.errors import InvalidRequestError
from jengine.text.messages import normalise_messages, normalise_tools

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
ROLES = ("system", "user", "developer", "assistant", "tool", "latest_reminder")
TURNS = ("user", "developer")  # after these it is the assistant's turn
SEPARATOR = "\n\n"

MAX_EFFORT = """Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve \
the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and \
adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, \
considered alternative, and rejected hypothesis to ensure absolutely no assumption is left \
unchecked.

"""
TOOLS = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, \
booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside \
{THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

%s

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
RESPONSE_FORMAT = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)


@dataclass(frozen=True)
class Mode:
    """How a conversation is written."""

    is_thinking: bool = False
    effort: str | None = None  # "high" changes nothing, "max" asks for it at the beginning
    drops_thinking: bool = True  # of turns before the last


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt. `variables`, as for a template: `thinking` or `enable_thinking` (default: no),
    `reasoning_effort` (another than "none" turns thinking on), `drop_thinking`, and
    `tools_in_new_message` (vLLM's place for `tools`: an empty system message before all others;
    default is DeepSeek's: the first system message).
    """
    if add_generation_prompt and continue_final_message:
        raise InvalidRequestError(
            "continue_final_message", "cannot be combined with add_generation_prompt"
        )
    variables = variables or {}
    chat = [_joined(message) for message in normalise_messages(messages, takes_parts=True)]
    for i, message in enumerate(chat):
        if message["role"] not in ROLES:
            raise InvalidRequestError(
                "messages", f"[{i}].role must be one of {', '.join(ROLES)}: {message['role']!r}"
            )
    if given := normalise_tools(tools):
        _attach_tools(chat, given, in_new_message=bool(variables.get("tools_in_new_message")))
    if continue_final_message:
        if chat[-1]["role"] != "assistant":
            raise InvalidRequestError(
                "continue_final_message", "the final message must be the assistant's"
            )
        chat[-1]["wo_eos"] = True
    chat = merge_tool_results(chat)
    mode = read_mode(variables, has_tools=any(message.get("tools") for message in chat))
    return _render(chat, mode, opens_turn=add_generation_prompt)


def read_mode(variables: Mapping[str, Any], *, has_tools: bool) -> Mode:
    """From a request's variables. Raises `InvalidRequestError` for an effort that is no word."""
    effort = variables.get("reasoning_effort")
    if effort is not None and not isinstance(effort, str):
        raise InvalidRequestError("reasoning_effort", f"must be a string, got {effort!r}")
    asked = variables.get("enable_thinking", variables.get("thinking"))
    is_thinking = effort not in (None, "none") if asked is None else bool(asked)
    if effort is not None:
        effort = {"none": None, "max": "max", "xhigh": "max"}.get(effort, "high")
    drops = bool(variables.get("drop_thinking", True)) and not has_tools
    return Mode(is_thinking, effort, drops)


def merge_tool_results(chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What user and tools say in turn is one user message; results are in the order of the calls
    that they answer."""
    merged: list[dict[str, Any]] = []
    order: dict[str, int] = {}  # of the newest calls
    for message in chat:
        if message["role"] not in ("user", "tool"):
            if message["role"] == "assistant":
                calls = message.get("tool_calls") or ()
                order = {str(call.get("id")): i for i, call in enumerate(calls)}
            merged.append(dict(message))
            continue
        if not merged or merged[-1]["role"] != "user" or "parts" not in merged[-1]:
            merged.append({"role": "user", "parts": []})
        target = merged[-1]
        if message["role"] == "user":
            others = {k: v for k, v in message.items() if k not in ("role", "content")}
            target.update(others)
            target["parts"].append((None, message.get("content") or ""))
        else:
            text = f"<tool_result>{message.get('content') or ''}</tool_result>"
            target["parts"].append((order.get(str(message.get("tool_call_id")), len(order)), text))
    for message in merged:
        if (parts := message.pop("parts", None)) is not None:
            message["content"] = SEPARATOR.join(_in_order(parts))
    return merged


def _in_order(parts: list[tuple[int | None, str]]) -> list[str]:
    """Results take the places of results; the user's own words stay where they are."""
    results = iter(sorted((p for p in parts if p[0] is not None), key=lambda part: part[0] or 0))
    return [text if place is None else next(results)[1] for place, text in parts]


def _render(chat: list[dict[str, Any]], mode: Mode, *, opens_turn: bool) -> str:
    if mode.is_thinking and mode.drops_thinking:  # what developers said to old turns goes, too
        last_turn = _last_turn(chat)
        chat = [m for i, m in enumerate(chat) if i >= last_turn or m["role"] != "developer"]
    last_turn = _last_turn(chat)
    text = BOS + (MAX_EFFORT if mode.is_thinking and mode.effort == "max" else "")
    for i, message in enumerate(chat):
        is_old = mode.drops_thinking and i < last_turn
        text += _render_message(message, chat[i - 1] if i else None, mode, is_old=is_old)
        is_last = i + 1 == len(chat)
        is_followed = opens_turn if is_last else chat[i + 1]["role"] == "assistant"
        if message["role"] in TURNS and is_followed:
            thinks = mode.is_thinking and (not mode.drops_thinking or i == last_turn)
            text += _transition(message.get("task"), THINK if thinks else END_THINK)
    return text


def _last_turn(chat: Sequence[Mapping[str, Any]]) -> int:
    return max((i for i, message in enumerate(chat) if message["role"] in TURNS), default=-1)


def _render_message(
    message: Mapping[str, Any], before: Mapping[str, Any] | None, mode: Mode, *, is_old: bool
) -> str:
    role, content = message["role"], message.get("content") or ""
    if role == "latest_reminder":
        return REMINDER + content
    if role == "user":
        return USER + content
    if role in ("system", "developer"):
        if role == "developer" and not content:
            raise InvalidRequestError("messages", "a developer message must not be empty")
        return (USER if role == "developer" else "") + SEPARATOR.join(
            _with_blocks(content, message)
        )
    reasoning = ""
    if mode.is_thinking and not is_old and not (before or {}).get("task"):
        reasoning = (message.get("reasoning_content") or "") + END_THINK
    calls = message.get("tool_calls") or ()
    end = "" if message.get("wo_eos") else EOS
    return reasoning + content + (SEPARATOR + render_calls(calls) if calls else "") + end


def _with_blocks(content: str, message: Mapping[str, Any]) -> list[str]:
    blocks = [content]
    if tools := message.get("tools"):
        schemas = [to_json(tool.get("function", tool)) for tool in tools]
        blocks.append(TOOLS % "\n".join(schemas))
    if (schema := message.get("response_format")) is not None:
        blocks.append(RESPONSE_FORMAT + to_json(schema))
    return blocks


def _transition(task: str | None, think: str) -> str:
    if task is None:
        return ASSISTANT + think
    if task not in TASKS:
        raise InvalidRequestError("messages", f"task must be one of {', '.join(TASKS)}: {task!r}")
    return f"{ASSISTANT}{think}<｜action｜>" if task == "action" else f"<｜{task}｜>"


def render_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Strings stand as they are, everything else as JSON."""
    invokes = []
    for call in calls:
        function = call.get("function") or {}
        arguments = function.get("arguments") or {}
        if not isinstance(arguments, Mapping):
            raise InvalidRequestError("messages", "arguments of a tool call must be an object")
        lines = [
            f'<{DSML}parameter name="{name}" string="{str(isinstance(value, str)).lower()}">'
            f"{value if isinstance(value, str) else to_json(value)}</{DSML}parameter>"
            for name, value in arguments.items()
        ]
        body = "\n".join(lines)
        invokes.append(f'<{DSML}invoke name="{function.get("name")}">\n{body}\n</{DSML}invoke>')
    return f"<{DSML}tool_calls>\n" + "\n".join(invokes) + f"\n</{DSML}tool_calls>"


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _attach_tools(chat: list[dict[str, Any]], tools: list[Any], *, in_new_message: bool) -> None:
    if in_new_message or not any(message["role"] == "system" for message in chat):
        chat.insert(0, {"role": "system", "content": "", "tools": tools})
        return
    system = next(message for message in chat if message["role"] == "system")
    system["tools"] = [*(system.get("tools") or ()), *tools]


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """With its text parts as one string."""
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = SEPARATOR.join(part["text"] for part in content)
    return message
