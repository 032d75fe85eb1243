"""Completions of DeepSeek-V4 that come in pieces, against the parser of whole ones."""

# ruff: noqa: RUF001  (the model's bars are full-width ones)
import json
import time
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jengine.text.deepseek_v4_chat import render_calls
from jengine.text.deepseek_v4_completion import Completion, ToolCall, parse_completion
from jengine.text.deepseek_v4_stream import CompletionParser

D = "｜DSML｜"
BEGIN, END = f"<{D}tool_calls>", f"</{D}tool_calls>"
INVOKE, END_INVOKE = f'<{D}invoke name="f">', f"</{D}invoke>"
PARAMETER = f'<{D}parameter name="x" string="true">'
NUMBER = f'<{D}parameter name="x" string="false">3</{D}parameter>'
STRING = f'<{D}parameter name="s" string="true">a "b"\n</{D}parameter>'
CALL = f"{INVOKE}\n{NUMBER}\n{STRING}\n{END_INVOKE}"
F = ToolCall("f", '{"x": 3, "s": "a \\"b\\"\\n"}')
OPEN = "\n\n" + BEGIN + "\n"
PIECES = (
    *("a", "\n", "<", '"', "</think>", "<think>", BEGIN, END, INVOKE, END_INVOKE, NUMBER, STRING),
    *(OPEN, CALL, OPEN + CALL + "\n" + END, f"<{D}", "tool_calls>", f'<{D}parameter name="y'),
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def parse(pieces: Iterable[str], *, is_thinking: bool, takes_calls: bool = True) -> Completion:
    parser = CompletionParser(is_thinking=is_thinking, takes_calls=takes_calls)
    parts = [parser.feed(piece) for piece in pieces]
    parts.append(parser.feed("", is_last=True))
    return Completion(
        "".join(part.reasoning for part in parts),
        "".join(part.content for part in parts),
        tuple(call for part in parts for call in part.tool_calls),
    )


@given(TEXTS, st.booleans(), st.booleans(), st.data())
def test_pieces_are_parsed_as_the_whole(
    text: str, is_thinking: bool, takes_calls: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse([text], is_thinking=is_thinking, takes_calls=takes_calls)
    assert parse(pieces, is_thinking=is_thinking, takes_calls=takes_calls) == whole
    assert parse(text, is_thinking=is_thinking, takes_calls=takes_calls) == whole
    if not whole.tool_calls:  # then nothing is lost
        tag = "</think>" if is_thinking and "</think>" in text else ""
        said = text.removeprefix("<think>") if is_thinking else text
        assert whole.reasoning + tag + whole.content == said
    for call in whole.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(f"\n{END_INVOKE}\n"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.text(st.characters(exclude_characters='"'), max_size=3), VALUES)


@settings(max_examples=40)
@given(st.text(max_size=5), st.text(max_size=5), st.lists(ARGUMENTS, max_size=3))
def test_what_was_rendered_is_parsed(
    reasoning: str, content: str, calls: list[dict[str, object]]
) -> None:
    asked = [{"function": {"name": f"f{i}", "arguments": c}} for i, c in enumerate(calls)]
    block = "\n\n" + render_calls(asked) if calls else ""
    parsed = parse(f"{reasoning}</think>{content}{block}", is_thinking=True)
    assert (parsed.reasoning, parsed.content) == (reasoning, content)
    assert [call.name for call in parsed.tool_calls] == [f"f{i}" for i in range(len(calls))]
    assert [json.loads(call.arguments) for call in parsed.tool_calls] == calls


@pytest.mark.parametrize(
    "text",
    [
        "r</think>x",
        f"<think>r</think>x{OPEN}{CALL}\n{END}",
        f"r\n</think>\n\n{OPEN}{CALL}\n{CALL}\n{END}",
        f"</think>{BEGIN}{INVOKE}\n\n{END_INVOKE}{END}",
    ],
)
def test_it_agrees_with_the_parser_of_whole_completions(text: str) -> None:
    assert parse(text, is_thinking=True) == parse_completion(text, is_thinking=True)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"x{OPEN}{CALL}", "x", [F]),  # the end is cut off
        (f"x{OPEN}{CALL}\n{INVOKE}\n{NUMBER}", f"x\n{INVOKE}\n{NUMBER}", [F]),
        (f"x{OPEN}{CALL}\n{END}more", "xmore", [F]),
        (f"x{OPEN}{CALL}\n{END}{OPEN}{CALL}\n{END}", "x", [F, F]),
        (f"x{OPEN}{END}", f"x{OPEN}{END}", []),
        (f"x{OPEN}hello", f"x{OPEN}hello", []),
        (f"{OPEN}{CALL}hello {END}", f"hello {END}", [F]),
        (OPEN + CALL.replace(">3<", ">NaN<"), OPEN + CALL.replace(">3<", ">NaN<"), []),
        (OPEN + CALL.replace('"s"', '"x"'), OPEN + CALL.replace('"s"', '"x"'), []),
        (OPEN + CALL.replace(">3<", f">{'[' * 99999}<"),) * 2 + ([],),
        (f"x{OPEN}{BEGIN}\n{CALL}", f"x{OPEN}", [F]),
        (f"{OPEN}{INVOKE}\n{END_INVOKE}\n{END}", "", [ToolCall("f", "{}")]),
    ],
)
def test_what_is_wrong_is_text(text: str, content: str, calls: list[ToolCall]) -> None:
    assert parse([text], is_thinking=False) == Completion("", content, tuple(calls))


def test_reasoning_without_an_end_is_reasoning() -> None:
    assert parse("r</thin", is_thinking=True) == Completion("r</thin", "")
    assert parse("<thi", is_thinking=True) == Completion("<thi", "")


def test_only_what_may_be_a_tag_is_held_back() -> None:
    parser = CompletionParser(is_thinking=True, takes_calls=True)
    assert parser.feed("hm") == Completion("hm", "")
    assert parser.feed(" </th") == Completion(" ", "")
    assert parser.feed("ank") == Completion("</thank", "")
    assert parser.feed("</think>yes\n") == Completion("", "yes")
    assert parser.feed("no") == Completion("", "\nno")
    assert parser.feed(f"{OPEN}{CALL[:-1]}") == Completion("", "")
    assert parser.feed(">") == Completion("", "", (F,))


def test_the_work_grows_with_the_length() -> None:
    """Quadratic in any of these is minutes."""
    size = 100_000
    for text in (
        f"{BEGIN}{INVOKE}{PARAMETER}" * (size // 100),
        f"{BEGIN}{INVOKE}" * (size // 50) + f"{NUMBER}x",
        BEGIN + " " * size,
        "\n\n<" * size,
    ):
        start = time.monotonic()
        parse([text], is_thinking=False)
        assert time.monotonic() - start < 1.0
