"""What is refused, how, and that everyone else goes on."""

import http.client
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.server.harness import RunningServer, echo_server, events, get, post, wait_for

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
SO = "structured_outputs"


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


# path, body, the field that the error names
BAD: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": 5}, "prompt"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [258]}, "prompt_token_ids"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt_token_ids"),
    (COMPLETIONS, {"prompt": [10**30]}, "prompt_token_ids"),
    (COMPLETIONS, {"prompt": "a" * 300}, "prompt"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 256}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n"),
    (COMPLETIONS, {"prompt": "a", "n": 10**9, "temperature": 1}, "prompt"),
    (COMPLETIONS, {"prompt": "a", "n": 1.5}, "n"),
    (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p"),
    (COMPLETIONS, {"prompt": "a", "top_k": -5}, "top_k"),
    (COMPLETIONS, {"prompt": "a", "min_p": 2}, "min_p"),
    (COMPLETIONS, {"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
    (COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETIONS, {"prompt": "a", "seed": 2**63}, "seed"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "logprobs": -1}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt": "a", "thinking_token_budget": 3}, "thinking_token_budget"),
    (COMPLETIONS, {"prompt": "a", "thinking_token_budget": -2}, "thinking_token_budget"),
    (COMPLETIONS, {"prompt": "a", "logprob_token_ids": [999]}, "logprob_token_ids"),
    (COMPLETIONS, {"prompt": "a", "logprob_token_ids": [1] * 129}, "logprob_token_ids"),
    (COMPLETIONS, {"prompt": "a", "logprob_token_ids": [1], "logprobs": 2}, "logprob_token_ids"),
    (COMPLETIONS, {"prompt": "a", "logprob_token_ids": [1], "echo": True}, "logprob_token_ids"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [999]}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 17}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": [5]}, "stop[0]"),
    (COMPLETIONS, {"prompt": "a", "min_tokens": 20}, "min_tokens"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
    (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of"),
    (COMPLETIONS, {"prompt": "a", "length_penalty": 2.0}, "length_penalty"),
    (COMPLETIONS, {"prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds"),
    (COMPLETIONS, {"prompt": "a", "guided_json": {"type": "object"}}, "guided_json"),
    (COMPLETIONS, {"prompt": "a", "response_format": {"type": "xml"}}, "response_format"),
    (COMPLETIONS, {"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format"),
    (
        COMPLETIONS,
        {"prompt": "a", "response_format": schema_format({"type": "x"})},
        "response_format",
    ),
    (
        COMPLETIONS,
        {"prompt": "a", "response_format": {"type": "structural_tag", "triggers": []}},
        "response_format",
    ),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "(a"}}, f"{SO}.regex"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": 5}}, f"{SO}.regex"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regexp": "a"}}, SO),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "a", "json": {}}}, SO),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"choice": []}}, f"{SO}.choice"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"choice": ["a", 5]}}, f"{SO}.choice"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"grammar": "x: y"}}, f"{SO}.grammar"),
    (
        COMPLETIONS,
        {"prompt": "a", "response_format": {"type": "json_object"}, SO: {"regex": "a"}},
        SO,
    ),
    (CHAT, {"messages": USER, "response_format": schema_format({"type": "x"})}, "response_format"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"prompt": "a", "priority": 1}, "priority"),
    (COMPLETIONS, {"prompt": "a", "request_id": "a b"}, "request_id"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 300}], "max_tokens": 1}, "messages"),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "logprobs"),
    (CHAT, {"messages": USER, "tools": [TOOL]}, "tools"),
    (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": USER, "functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"messages": USER, "audio": {"voice": "x"}}, "audio"),
    (CHAT, {"messages": USER, "modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"messages": USER, "store": True}, "store"),
    (CHAT, {"messages": USER, "chat_template": "x"}, "chat_template"),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
    ),
    (
        CHAT,
        {"messages": USER, "add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
    ),
    ("/detokenize", {"tokens": [258]}, "tokens"),
    ("/detokenize", {"tokens": "ab"}, "tokens"),
    ("/tokenize", {}, "prompt"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
def test_bad_requests_name_the_field(
    server: RunningServer, path: str, body: dict[str, Any], param: str
) -> None:
    status, answer, _ = post(server.http + path, body)
    assert status == 400, answer
    error = answer["error"]
    assert (error["code"], error["type"], error["param"]) == (400, "BadRequestError", param)
    assert param.partition("[")[0].partition(".")[0] in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt": "\xff"}', b"[1]", b'{"prompt": NaN}'])
def test_what_is_not_json(server: RunningServer, body: bytes) -> None:
    status, answer, _ = post(server.http + COMPLETIONS, body)
    assert status == 400
    assert answer["error"]["param"] == "body"


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-encoding": "gzip"}])
def test_other_media_types(server: RunningServer, headers: dict[str, str]) -> None:
    assert post(server.http + COMPLETIONS, {"prompt": "a"}, headers)[0] == 415


def test_unknown_model(server: RunningServer) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": USER})):
        status, answer, _ = post(server.http + path, {**body, "model": "other"})
        assert status == 404
        assert answer["error"]["param"] == "model"
    assert post(server.http + COMPLETIONS, {"prompt": "a", "model": "alias"})[0] == 200


def test_unknown_path_and_method(server: RunningServer) -> None:
    status, text = get(server.http + "/v1/nothing")
    assert (status, json.loads(text)["error"]["code"]) == (404, 404)
    assert get(server.http + COMPLETIONS)[0] == 405


def test_a_stream_that_is_refused_has_a_status(server: RunningServer) -> None:
    status, answer, _ = post(server.http + COMPLETIONS, {"prompt": [258], "stream": True})
    assert (status, answer["error"]["param"]) == (400, "prompt_token_ids")


def test_neighbours_go_on_unharmed(slow_server: RunningServer) -> None:
    """Long streams run while every bad request of the table is thrown at the server."""
    texts: list[str] = []

    def stream() -> None:
        body = {"prompt": "abcd", "max_tokens": 120, "stream": True}
        chunks = events(slow_server.http + COMPLETIONS, body)
        texts.append("".join(chunk["choices"][0]["text"] for chunk in chunks))

    threads = [threading.Thread(target=stream) for _ in range(4)]
    for thread in threads:
        thread.start()
    for path, body, _ in BAD:
        assert post(slow_server.http + path, body)[0] == 400
    for thread in threads:
        thread.join()
    assert texts == ["abcd" * 30] * 4


def test_duplicate_request_id(slow_server: RunningServer) -> None:
    body = {"prompt": "a", "max_tokens": 200, "request_id": "twice"}
    thread = threading.Thread(target=post, args=(slow_server.http + COMPLETIONS, body))
    thread.start()
    try:
        wait_for(lambda: slow_server.utility("running"), 5.0)
        status, answer, _ = post(slow_server.http + COMPLETIONS, body)
        assert (status, answer["error"]["type"]) == (409, "ConflictError")
    finally:
        thread.join()


def test_full_queue(echo_model: Path) -> None:
    with echo_server(echo_model, behaviour={"step_seconds": 0.01}, max_num_waiting=1) as server:
        body = {"prompt": "a", "max_tokens": 100}
        thread = threading.Thread(target=post, args=(server.http + COMPLETIONS, body))
        thread.start()
        wait_for(lambda: server.utility("running"), 5.0)
        status, answer, headers = post(server.http + COMPLETIONS, {**body, "stream": True})
        assert (status, answer["error"]["type"]) == (429, "RateLimitError")
        assert headers["retry-after"] == "1"
        thread.join()
        assert post(server.http + COMPLETIONS, {"prompt": "a"})[0] == 200


def test_large_bodies(echo_model: Path) -> None:
    with echo_server(echo_model, max_body_bytes=1000) as server:
        status, answer, _ = post(server.http + COMPLETIONS, {"prompt": "a" * 2000})
        assert (status, answer["error"]["code"]) == (413, 413)
        assert _post_chunked(server, [b'{"prompt": "', *[b"a" * 100] * 20, b'"}']) == 413
        assert _post_chunked(server, [b'{"prompt": "a", ', b'"max_tokens": 1}']) == 200


def test_large_headers(server: RunningServer) -> None:
    assert get(server.http + "/version", {"x-large": "a" * 60_000})[0] == 200
    many = {f"x-{i}": "a" * 1000 for i in range(100)}
    assert get(server.http + "/version", many)[0] == 431


def _post_chunked(server: RunningServer, pieces: list[bytes]) -> int:
    """A body without a length."""
    connection = http.client.HTTPConnection("127.0.0.1", server.app.http_port or 0)
    try:
        connection.request(
            "POST",
            COMPLETIONS,
            body=iter(pieces),
            headers={"content-type": "application/json", "transfer-encoding": "chunked"},
            encode_chunked=True,
        )
        return connection.getresponse().status
    finally:
        connection.close()
