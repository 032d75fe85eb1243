"""Reasoning and calls of tools over /v1/chat/completions. The echo core says what the prompt says,
a byte a token, and a template of the request's makes that the first message.
"""

# ruff: noqa: RUF001  (the model's bars are full-width ones)
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jengine.server.openai_messages import MessageFormat
from tests.server.harness import RunningServer, echo_server, events, post

PATH = "/v1/chat/completions"
PARSERS = {
    "reasoning_parser": "deepseek_v4",
    "tool_call_parser": "deepseek_v4",
    "enable_auto_tool_choice": True,
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
D = "｜DSML｜"
CALL = (
    f'<{D}invoke name="f">\n<{D}parameter name="s" string="true">ü "</{D}parameter>\n'
    f'<{D}parameter name="x" string="false">[3]</{D}parameter>\n</{D}invoke>\n'
)
BLOCK = f"\n\n<{D}tool_calls>\n{CALL}{CALL}</{D}tool_calls>"
FUNCTION = {"name": "f", "arguments": '{"s": "ü \\"", "x": [3]}'}
THINKS, ANSWERS = "{{ messages[0].content }}<think>", "{{ messages[0].content }}"


@pytest.fixture(scope="module")
def talker(echo_model: Path) -> Iterator[RunningServer]:
    options = {"trust_request_chat_template": True, "max_model_len": 2048, **PARSERS}
    with echo_server(echo_model, **options) as running:
        yield running


def body_of(text: str, template: str, **more: Any) -> dict[str, Any]:
    """A request that `text` answers."""
    message = {"role": "user", "content": text + "%"}
    body = {"messages": [message], "chat_template": template, "stop": "%", "max_tokens": 900}
    return {**body, "tools": TOOLS, **more}


def ask(server: RunningServer, body: dict[str, Any]) -> dict[str, Any]:
    status, answer, _ = post(server.http + PATH, body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    return choice


def joined(server: RunningServer, body: dict[str, Any]) -> dict[str, Any]:
    """The message that the deltas make, and why it ended."""
    told = [event["choices"][0] for event in events(server.http + PATH, {**body, "stream": True})]
    reasons = [choice["finish_reason"] for choice in told]
    assert set(reasons[:-1]) <= {None}, "nothing comes after the end"
    message = add_up(choice["delta"] for choice in told)
    return {"message": message, "finish_reason": reasons[-1]}


def add_up(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """As a client does."""
    message: dict[str, Any] = {}
    for delta in deltas:
        calls = message.setdefault("tool_calls", []) if "tool_calls" in delta else []
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["id"].startswith("call_")
                assert call["function"] == {"name": "f", "arguments": ""}
                calls.append({**call, "function": dict(call["function"])})
            else:
                assert call.keys() == {"index", "function"}
                assert call["index"] == len(calls) - 1
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        for name in delta.keys() - {"tool_calls"}:
            message[name] = message.get(name, "") + delta[name]
    return message


def test_reasoning_answer_and_calls(talker: RunningServer) -> None:
    body = body_of(f"hm\n</think>yes{BLOCK}", THINKS)
    choice = ask(talker, body)
    message = choice["message"]
    ids = [call.pop("id") for call in message["tool_calls"]]
    assert len({*ids}) == 2
    assert message == {
        "role": "assistant",
        "content": "yes",
        "reasoning": "hm\n",
        "reasoning_content": "hm\n",
        "tool_calls": [{"type": "function", "function": FUNCTION}] * 2,
    }
    assert choice["finish_reason"] == "tool_calls"
    streamed = joined(talker, body)
    calls = [(call.pop("id"), call.pop("index")) for call in streamed["message"]["tool_calls"]]
    assert [index for _, index in calls] == [0, 1]
    assert streamed == {"message": message, "finish_reason": "tool_calls"}


def test_deltas_of_single_characters() -> None:
    """The server merges what its client has not read yet."""
    writer = MessageFormat(is_thinking=True, takes_calls=True).writer()
    pieces = [*f"hm</think>yes{BLOCK}", ""]
    deltas = [d for c in pieces for d in writer.deltas(c, is_last=c == "")]
    message = add_up(deltas)
    assert (message["content"], message["reasoning"]) == ("yes", "hm")
    assert message["reasoning_content"] == "hm"
    assert [call["function"] for call in message["tool_calls"]] == [FUNCTION] * 2
    assert [call["index"] for call in message["tool_calls"]] == [0, 1]
    assert writer.finish_reason("stop") == "tool_calls"
    assert len(deltas) == len("hmyes") + 4  # two for each call


@pytest.mark.parametrize(
    ("text", "template", "more", "expected", "reason"),
    [
        ("hi", ANSWERS, {}, {"content": "hi"}, "stop"),
        ("hm", THINKS, {}, {"content": None, "reasoning": "hm"}, "stop"),
        ("hm</think>a", THINKS, {"include_reasoning": False}, {"content": "a"}, "stop"),
        ("hm</think>a", THINKS, {"response_format": {"type": "text"}},
         {"content": "a", "reasoning": "hm"}, "stop"),
        ("hm</think>a", THINKS, {"structured_outputs": {"regex": ".*"}},
         {"content": "hm</think>a"}, "stop"),
        ("hm</think>a", ANSWERS, {}, {"content": "hm</think>a"}, "stop"),
        (BLOCK, ANSWERS, {"tool_choice": "none"}, {"content": BLOCK}, "stop"),
        (BLOCK, ANSWERS, {"tools": None}, {"content": BLOCK}, "stop"),
        (BLOCK, ANSWERS, {"parallel_tool_calls": False}, {"content": None, "calls": 1},
         "tool_calls"),
        (f"{BLOCK[:25]}?", ANSWERS, {}, {"content": f"{BLOCK[:25]}?"}, "stop"),
    ],
)  # fmt: skip
def test_messages(
    talker: RunningServer,
    text: str,
    template: str,
    more: dict[str, Any],
    expected: dict[str, Any],
    reason: str,
) -> None:
    body = body_of(text, template, **more)
    for choice in (ask(talker, body), joined(talker, body)):
        message = choice["message"]
        assert choice["finish_reason"] == reason
        assert (message["content"] or None) == expected["content"]
        assert message.get("reasoning") == expected.get("reasoning")
        assert message.get("reasoning_content") == expected.get("reasoning")
        assert len(message.get("tool_calls", ())) == expected.get("calls", 0)


def test_calls_before_a_text_that_is_cut_off(talker: RunningServer) -> None:
    begin = f"\n\n<{D}tool_calls>\n"
    cut = CALL[:60]
    body = body_of(BLOCK, ANSWERS, max_tokens=len((begin + CALL + cut).encode()))
    for choice in (ask(talker, body), joined(talker, body)):
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == "\n" + cut
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == FUNCTION


def test_logprobs_and_ids_go_with_the_deltas(talker: RunningServer) -> None:
    """Of every token, though most of them say nothing yet."""
    text = f"hm</think>{BLOCK}"
    body = body_of(text, THINKS, logprobs=True, return_token_ids=True, stream=True)
    told = [event["choices"][0] for event in events(talker.http + PATH, body)]
    ids = [i for choice in told for i in choice.get("token_ids", ())]
    assert len(ids) == len((text + "%").encode())
    assert sum(len(c["logprobs"]["content"]) for c in told if c["logprobs"]) == len(ids)


def test_special_tokens_are_text_for_a_parser(talker: RunningServer) -> None:
    """Its tags may be such."""
    assert ask(talker, body_of("a<bos>b", ANSWERS))["message"]["content"] == "a<bos>b"
    plain = body_of("a<bos>b", ANSWERS, tool_choice="none")
    assert ask(talker, plain)["message"]["content"] == "ab"


def test_tools_reach_the_template(talker: RunningServer) -> None:
    template = "{{ tools[0].function.name if tools else 'none' }}%"
    assert ask(talker, body_of("", template))["message"]["content"] == "f"
    body = body_of("", template, tool_choice="none")
    assert ask(talker, body)["message"]["content"] == "none"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS * 129}, "tools"),
        ({"tools": ["f"]}, "tools"),
    ],
)
def test_refusals(talker: RunningServer, more: dict[str, Any], param: str) -> None:
    status, answer, _ = post(talker.http + PATH, body_of("a", ANSWERS, **more))
    assert status == 400, answer
    assert answer["error"]["param"].partition("[")[0] == param


def test_without_flags_text_stays_whole(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "a</think>b"}]
    body = {"messages": messages, "max_tokens": 27, "chat_template_kwargs": {"thinking": True}}
    message = ask(server, body)["message"]
    assert message == {"role": "assistant", "content": "[user]a</think>b[assistant]"}
