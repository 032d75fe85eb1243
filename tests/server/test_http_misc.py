"""The small routes, request ids, keys."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from jengine.server.http_middleware import OPEN_PATHS
from jengine.server.http_server import create_app
from tests.server.harness import MODEL_NAME, RunningServer, echo_server, get, post


def test_models(server: RunningServer) -> None:
    status, text = get(server.http + "/v1/models")
    cards = json.loads(text)["data"]
    assert status == 200
    assert [card["id"] for card in cards] == [MODEL_NAME, "alias"]
    assert {card["max_model_len"] for card in cards} == {256}


def test_tokenize_and_back(server: RunningServer) -> None:
    _, answer, _ = post(server.http + "/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert answer["tokens"] == list("hé".encode())
    assert (answer["count"], answer["max_model_len"]) == (3, 256)
    assert len(answer["token_strs"]) == 3
    assert post(server.http + "/detokenize", {"tokens": answer["tokens"]})[1] == {"prompt": "hé"}


def test_tokenize_a_conversation(server: RunningServer) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    assert post(server.http + "/tokenize", body)[1]["tokens"] == list(b"[user]x[assistant]")
    body["add_generation_prompt"] = False
    assert post(server.http + "/tokenize", body)[1]["tokens"] == list(b"[user]x")


def test_tokenizer_info(server: RunningServer) -> None:
    info = json.loads(get(server.http + "/tokenizer_info")[1])
    assert info["eos_token"] == "<eos>"
    assert "message" in info["chat_template"]
    assert info["tokenizer_class"]


@pytest.mark.parametrize(
    "path", ["/health", "/ping", "/ready", "/live", "/version", "/load", "/metrics"]
)
def test_small_routes(server: RunningServer, path: str) -> None:
    assert get(server.http + path)[0] == 200


def test_request_ids_come_back(server: RunningServer) -> None:
    headers = {"x-request-id": "my-id.1"}
    _, answer, got = post(server.http + "/v1/completions", {"prompt": "a"}, headers)
    assert got["x-request-id"] == "my-id.1"
    assert answer["id"] == "cmpl-my-id.1"
    status, answer, _ = post(
        server.http + "/v1/completions", {"prompt": "a"}, {"x-request-id": "é" * 3}
    )
    assert (status, answer["error"]["param"]) == (400, "x-request-id")


def test_a_key_covers_every_route(echo_model: Path) -> None:
    with echo_server(echo_model, api_keys=("sesame", "other")) as server:
        routes = create_app(server.app.state).routes
        paths = {route.path for route in routes if isinstance(route, Route)}
        assert paths >= OPEN_PATHS
        for path in [*paths, "/made-up", "//v1/models", "/v1/models/../models"]:
            expected = 200 if path in OPEN_PATHS else 401
            assert get(server.http + path)[0] == expected, path
        for header in ("Bearer wrong", "sesame", "Basic sesame", "Bearer "):
            assert get(server.http + "/v1/models", {"authorization": header})[0] == 401
        for key in ("sesame", "other"):
            header = {"authorization": f"Bearer {key}"}
            assert get(server.http + "/v1/models", header)[0] == 200
        _, text = get(server.http + "/v1/models")
        assert json.loads(text)["error"]["type"] == "AuthenticationError"
