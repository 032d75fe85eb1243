"""/v1/chat/completions on the echo core, whose template renders "[role]content...[assistant]"."""

from typing import Any

import msgspec
import pytest

from jengine.server.openai_protocol import ChatRequest
from tests.server.harness import RunningServer, events, post

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
RENDERED = "[user]hi[assistant]"


def ask(server: RunningServer, **body: Any) -> dict[str, Any]:
    status, answer, _ = post(
        server.http + PATH, {"messages": USER, "max_tokens": len(RENDERED), **body}
    )
    assert status == 200, answer
    return answer


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def test_the_whole_answer(server: RunningServer) -> None:
    answer = ask(server)
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": RENDERED},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["prompt_tokens"] == len(RENDERED)


def test_the_model_s_default_length_holds(server: RunningServer) -> None:
    _, answer, _ = post(server.http + PATH, {"messages": USER})
    assert answer["usage"]["completion_tokens"] == 7  # generation_config.json of the echo model


def test_max_completion_tokens_wins(server: RunningServer) -> None:
    assert text_of(ask(server, max_completion_tokens=3)) == RENDERED[:3]


def test_content_parts_become_lines(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = ask(server, messages=[{"role": "user", "content": parts}], max_tokens=9)
    assert text_of(answer) == "[user]a\nb"


def test_continuing_the_last_message(server: RunningServer) -> None:
    messages = [*USER, {"role": "assistant", "content": "Well"}]
    rendered = "[user]hi[assistant]Well"
    body = {"messages": messages, "continue_final_message": True, "max_tokens": len(rendered)}
    assert text_of(ask(server, **body)) == rendered
    assert text_of(ask(server, **body, echo=True)) == "Well" + rendered


def test_logprobs(server: RunningServer) -> None:
    (choice,) = ask(server, logprobs=True, top_logprobs=2, max_tokens=2)["choices"]
    first, second = choice["logprobs"]["content"]
    assert (first["token"], first["bytes"], first["logprob"]) == ("[", [91], -0.5)
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.25, -0.5]
    assert second["token"] == "u"
    (choice,) = ask(server, logprob_token_ids=[8, 97], max_tokens=1)["choices"]
    (first,) = choice["logprobs"]["content"]
    assert [(top["bytes"], top["logprob"]) for top in first["top_logprobs"]] == [
        ([8], -1.0),
        ([97], -12.125),
    ]
    (choice,) = ask(server, logprobs=True, max_tokens=1)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_logprob_bytes_of_a_piece_of_a_character(server: RunningServer) -> None:
    euro = "€".encode()
    messages = [{"role": "user", "content": "€"}]
    answer = ask(server, messages=messages, logprobs=True, max_tokens=9)
    pieces = answer["choices"][0]["logprobs"]["content"][6:9]
    assert [piece["bytes"] for piece in pieces] == [[byte] for byte in euro]


def test_stream_equals_whole(server: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "grüße 😀"}], "max_tokens": 40}
    whole = ask(server, **body)
    first, *rest = events(server.http + PATH, {**body, "stream": True})
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in rest) == text_of(whole)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in rest]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) <= {None}


def test_stream_of_choices(server: RunningServer) -> None:
    body = {"messages": USER, "max_tokens": 5, "n": 3, "temperature": 1.0, "seed": 9}
    whole = ask(server, **body)
    texts, roles = {0: "", 1: "", 2: ""}, []
    for chunk in events(server.http + PATH, {**body, "stream": True}):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"]["content"]
        roles += [choice["index"]] if "role" in choice["delta"] else []
    assert sorted(roles) == [0, 1, 2]
    expected = {c["index"]: c["message"]["content"] for c in whole["choices"]}
    assert texts == expected
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize("include", [None, False, True])
@pytest.mark.parametrize("continuous", [False, True])
def test_usage_matrix(server: RunningServer, include: bool | None, continuous: bool) -> None:
    options = {"include_usage": include, "continuous_usage_stats": continuous}
    body = {"messages": USER, "max_tokens": 5, "stream": True, "stream_options": options}
    chunks = events(server.http + PATH, body)
    with_usage = [chunk for chunk in chunks if "usage" in chunk]
    if not include:
        assert with_usage == []
        return
    assert with_usage[-1]["choices"] == []
    assert with_usage[-1]["usage"]["completion_tokens"] == 5
    assert len(with_usage) == (len(chunks) if continuous else 1)


def test_tools_that_may_not_be_called_are_harmless(server: RunningServer) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert text_of(ask(server, tools=tools, tool_choice="none")) == RENDERED


def test_unknown_and_harmless_fields_are_ignored(server: RunningServer) -> None:
    extra = {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "brand_new": [1]}
    assert text_of(ask(server, **extra, parallel_tool_calls=False)) == RENDERED


def test_text_is_an_allowed_format(server: RunningServer) -> None:
    assert text_of(ask(server, response_format={"type": "text"})) == RENDERED


def test_effort_and_reasoning_reach_the_renderer() -> None:
    """The echo core's template knows of neither."""
    turn = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    body = {"messages": [*USER, turn], "reasoning_effort": "high"}
    request = msgspec.convert(body, ChatRequest)
    assert request.template_arguments()["reasoning_effort"] == "high"
    assert request.messages[1].render(1)["reasoning_content"] == "r"
    assert (
        "reasoning_effort"
        not in msgspec.convert({"messages": USER}, ChatRequest).template_arguments()
    )
