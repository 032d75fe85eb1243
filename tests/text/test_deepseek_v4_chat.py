"""Conversations of DeepSeek-V4: golden strings of its own encoder, and its completions."""

# ruff: noqa: RUF001  (the model's bars are full-width ones)
import json
from pathlib import Path
from typing import Any

import pytest

from jengine.errors import InvalidRequestError
from jengine.text.deepseek_v4_chat import MAX_EFFORT, TOOLS, render_chat
from jengine.text.deepseek_v4_completion import Completion, ToolCall, parse_completion
from jengine.text.tokenizer import Tokenizer
from tests.oracles.tiny_llama import save_tiny_tokenizer

B, E = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
U, A, D = "<｜User｜>", "<｜Assistant｜>", "｜DSML｜"
THINKING = {"thinking": True}
Chat = list[dict[str, Any]]


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": content, **more}


TWO_TURNS = [user("a"), assistant("b", reasoning_content="r1"), user("c")]
GOLDEN: list[tuple[Chat, dict[str, Any], str]] = [
    ([user("Hi")], {}, f"{B}{U}Hi{A}</think>"),
    ([user("Hi")], THINKING, f"{B}{U}Hi{A}<think>"),
    ([user("Hi")], {"thinking": True, "reasoning_effort": "high"}, f"{B}{U}Hi{A}<think>"),
    ([user("Hi")], {"reasoning_effort": "medium"}, f"{B}{U}Hi{A}<think>"),
    ([user("Hi")], {"reasoning_effort": "none"}, f"{B}{U}Hi{A}</think>"),
    ([user("Hi")], {"enable_thinking": False, "reasoning_effort": "max"}, f"{B}{U}Hi{A}</think>"),
    (
        [system("S"), user("Hi")],
        {"thinking": True, "reasoning_effort": "max"},
        f"{B}{MAX_EFFORT}S{U}Hi{A}<think>",
    ),
    (TWO_TURNS, THINKING, f"{B}{U}a{A}</think>b{E}{U}c{A}<think>"),
    (
        TWO_TURNS,
        {"thinking": True, "drop_thinking": False},
        f"{B}{U}a{A}<think>r1</think>b{E}{U}c{A}<think>",
    ),
    (TWO_TURNS, {}, f"{B}{U}a{A}</think>b{E}{U}c{A}</think>"),
    ([user("a"), system("SYS"), user("c")], {}, f"{B}{U}aSYS{U}c{A}</think>"),
    ([user("a"), user("b")], {}, f"{B}{U}a\n\nb{A}</think>"),
    ([user("a"), assistant("partial", wo_eos=True)], {}, f"{B}{U}a{A}</think>partial"),
    ([user("a", task="action")], {}, f"{B}{U}a{A}</think><｜action｜>"),
    ([user("a", task="query")], {}, f"{B}{U}a<｜query｜>"),
    ([user("q"), assistant("x")], THINKING, f"{B}{U}q{A}<think></think>x{E}"),
    (
        [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],  # type: ignore[arg-type]
        {},
        f"{B}{U}a\n\nb{A}</think>",
    ),
    (
        [{"role": "developer", "content": "x"}, {"role": "latest_reminder", "content": "y"}],
        {},
        f"{B}{U}x<｜latest_reminder｜>y",
    ),
]


def test_old_developers_are_dropped_with_old_reasoning() -> None:
    developer = {"role": "developer", "content": "d"}
    chat = [user("a"), developer, assistant("b", reasoning="r"), developer, user("c")]
    assert render_chat(chat, variables=THINKING) == f"{B}{U}a{A}</think>b{E}{U}c{A}<think>"
    assert render_chat(chat) == f"{B}{U}a{U}d{A}</think>b{E}{U}d{U}c{A}</think>"


@pytest.mark.parametrize(("chat", "variables", "expected"), GOLDEN)
def test_golden_strings(chat: Chat, variables: dict[str, Any], expected: str) -> None:
    assert render_chat(chat, variables=variables) == expected


def call(name: str, arguments: str, call_id: str = "") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


FUNCTION = {"name": "f", "description": "für x", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALLS_TEXT = (
    f'\n\n<{D}tool_calls>\n<{D}invoke name="f">\n'
    f'<{D}parameter name="x" string="false">3</{D}parameter>\n'
    f'<{D}parameter name="s" string="true">he"y</{D}parameter>\n</{D}invoke>\n</{D}tool_calls>'
)


def test_calls_and_their_results() -> None:
    chat = [
        user("q"),
        assistant("", reasoning="r", tool_calls=[call("f", '{"x": 3, "s": "he\\"y"}')]),
        {"role": "tool", "content": "42"},
    ]
    text = render_chat(chat, variables={"thinking": True, "drop_thinking": False})
    assert (
        text
        == f"{B}{U}q{A}<think>r</think>{CALLS_TEXT}{E}{U}<tool_result>42</tool_result>{A}<think>"
    )


def test_results_come_in_the_order_of_their_calls() -> None:
    calls = [call("f", "{}", "1"), call("g", '{"n": null, "l": [1, "ü"]}', "2")]
    chat = [
        user("q"),
        assistant("c", tool_calls=calls),
        {"role": "tool", "tool_call_id": "2", "content": "two"},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        user("and?"),
    ]
    assert render_chat(chat) == (
        f'{B}{U}q{A}</think>c\n\n<{D}tool_calls>\n<{D}invoke name="f">\n\n</{D}invoke>\n'
        f'<{D}invoke name="g">\n<{D}parameter name="n" string="false">null</{D}parameter>\n'
        f'<{D}parameter name="l" string="false">[1, "ü"]</{D}parameter>\n</{D}invoke>\n'
        f"</{D}tool_calls>{E}{U}<tool_result>one</tool_result>\n\n<tool_result>two</tool_result>"
        f"\n\nand?{A}</think>"
    )


def test_where_tools_are_described() -> None:
    """DeepSeek: with the system message, whose reasoning then stays. vLLM: in one of their own."""
    block = TOOLS % json.dumps(FUNCTION, ensure_ascii=False)
    assert block.endswith("to invoke tool calls.\n")
    assert f'"<{D}tool_calls>" block' in block and "für x" in block
    chat = [system("S"), *TWO_TURNS]
    turns = f"{U}a{A}<think>r1</think>b{E}{U}c{A}<think>"
    assert render_chat(chat, tools=[TOOL], variables=THINKING) == f"{B}S\n\n{block}{turns}"
    apart = {**THINKING, "tools_in_new_message": True}
    assert render_chat(chat, tools=[TOOL], variables=apart) == f"{B}\n\n{block}S{turns}"
    assert render_chat(TWO_TURNS, tools=[TOOL], variables=THINKING) == f"{B}\n\n{block}{turns}"
    schema = {"type": "object"}
    form = 'adhere to the following schema to reply:\n{"type": "object"}'
    assert render_chat([system("S", response_format=schema), user("a")]) == (
        f"{B}S\n\n## Response Format:\n\nYou MUST strictly {form}{U}a{A}</think>"
    )


def test_an_answer_that_goes_on() -> None:
    chat = [user("a"), assistant("par")]
    options: dict[str, Any] = dict(add_generation_prompt=False, continue_final_message=True)
    assert render_chat(chat, **options) == f"{B}{U}a{A}</think>par"
    assert render_chat([user("a")], add_generation_prompt=False) == f"{B}{U}a"


@pytest.mark.parametrize(
    ("chat", "options", "field"),
    [
        ([{"role": "robot", "content": "x"}], {}, "messages"),
        ([{"role": "developer", "content": ""}], {}, "messages"),
        ([user("a", task="dance")], {}, "messages"),
        ([user("a"), assistant("", tool_calls=[call("f", "[1]")])], {}, "messages"),
        ([user("a")], {"variables": {"reasoning_effort": 3}}, "reasoning_effort"),
        ([user("a")], {"continue_final_message": True, "add_generation_prompt": False},
         "continue_final_message"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused(chat: Chat, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render_chat(chat, **options)
    assert caught.value.field == field


def test_completions_are_taken_apart() -> None:
    assert parse_completion("x", is_thinking=False) == Completion("", "x")
    assert parse_completion(f"r</think>x{E}", is_thinking=True) == Completion("r", "x")
    with_calls = parse_completion(f"r</think>x{CALLS_TEXT}{E}", is_thinking=True)
    assert with_calls == Completion("r", "x", (ToolCall("f", '{"x": 3, "s": "he\\"y"}'),))
    assert json.loads(with_calls.tool_calls[0].arguments) == {"x": 3, "s": 'he"y'}


def test_what_was_rendered_is_parsed_again() -> None:
    arguments = {"a": "line\nbreak </x>", "b": {"k": [1.5, None, True]}, "ü": ""}
    calls = [call("f", json.dumps(arguments)), call("g", "{}"), call("f", '{"n": -1}')]
    text = render_chat(
        [user("q"), assistant("c", reasoning="r", tool_calls=calls)], variables=THINKING
    )
    completion = text.partition("<think>")[2]
    parsed = parse_completion(completion, is_thinking=True)
    assert (parsed.reasoning, parsed.content) == ("r", "c")
    assert [c.name for c in parsed.tool_calls] == ["f", "g", "f"]
    assert [json.loads(c.arguments) for c in parsed.tool_calls] == [arguments, {}, {"n": -1}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no end", "without </think>"),
        ("r</think>x</think>", "should be none"),
        (f"r</think>{E}more", "after the end"),
        (f"r</think>x{CALLS_TEXT}more", "after the tool calls"),
        (f"r</think>\n\n<{D}tool_calls>\n", "without </"),
        (f"r</think>\n\n<{D}tool_calls>\n</{D}tool_calls>", "without any"),
        (f"r</think>\n\n<{D}tool_calls>\nhello\n</{D}tool_calls>", "no tool call"),
        ("r</think>" + CALLS_TEXT.replace('name="s"', 'name="x"'), "given twice"),
        ("r</think>" + CALLS_TEXT.replace(">3<", ">three<"), "Expecting value"),
    ],
)
def test_malformed_completions_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_completion(text, is_thinking=True)


def test_tokenizers_of_the_model_write_so(tmp_path: Path) -> None:
    """They come without a template; one that is given is used."""
    save_tiny_tokenizer(tmp_path, chat_template=None)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v4"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.apply_chat_template([user("Hi")], thinking=True) == f"{B}{U}Hi{A}<think>"
    assert tokenizer.apply_chat_template([user("Hi")], chat_template="{{ 'x' }}") == "x"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer.from_folder(tmp_path).apply_chat_template([user("Hi")])
