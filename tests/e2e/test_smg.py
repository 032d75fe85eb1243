"""Conformance: the public gateway `smg` (PyPI), unmodified, in front of our gRPC port, driven by
the OpenAI client.
"""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.gateway import smg_gateway
from tests.e2e.live import MODEL, LiveServer
from tests.server.harness import get, post

pytestmark = pytest.mark.slow
USER: Any = [{"role": "user", "content": "Name three rivers in Europe."}]


@pytest.fixture(scope="module")
def gateway(live: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("smg") / "smg.log"
    flags = ["--backend", "vllm", "--policy", "cache_aware", "--block-size", "16"]
    with smg_gateway([f"grpc://{live.grpc}"], log, *flags) as url:
        yield url


@pytest.fixture(scope="module")
def client(gateway: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway + "/v1", api_key="x", max_retries=0) as client:
        yield client


def test_it_read_our_facts(gateway: str) -> None:
    (worker,) = json.loads(get(gateway + "/workers")[1])["workers"]
    labels = worker["labels"]
    assert worker["is_healthy"]
    assert labels["served_model_name"] == MODEL
    assert (labels["page_size"], labels["max_num_seqs"]) == ("16", "16")
    assert labels["vocab_size"] == "49152"


def test_chat_is_what_our_own_http_says(client: openai.OpenAI, live: LiveServer) -> None:
    body: Any = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 24}
    ours = post(live.http + "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    theirs = client.chat.completions.create(**body)
    assert theirs.choices[0].message.content == ours
    assert theirs.usage is not None
    assert theirs.usage.completion_tokens == 24
    stream = client.chat.completions.create(**body, stream=True)
    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert text == ours


def test_completions_logprobs_n_and_stop(client: openai.OpenAI) -> None:
    prompt = "The capital of France is"
    body: Any = {"model": MODEL, "max_tokens": 8}
    (choice,) = client.completions.create(**body, prompt=prompt, temperature=0).choices
    assert "Paris" in choice.text
    chat = client.chat.completions.create(
        **body, messages=USER, temperature=0, logprobs=True, top_logprobs=2
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 8
    chat = client.chat.completions.create(**body, messages=USER, n=2, seed=3, temperature=1.0)
    assert [choice.index for choice in chat.choices] == [0, 1]
    (stopped,) = client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=20, stop=[" 7"]
    ).choices
    assert stopped.text == " 5, 6,"


def test_errors_pass_through(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=MODEL, messages=USER, temperature=-1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="word " * 600)


def test_a_client_that_leaves_frees_its_pages(client: openai.OpenAI, live: LiveServer) -> None:
    """The gateway cancels with the Abort RPC."""
    stream = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert live.load()["num_pages_used"] > 0
    stream.close()
    live.wait_idle(5.0)
