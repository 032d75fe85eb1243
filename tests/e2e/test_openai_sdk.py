"""The official OpenAI client against the real model over HTTP."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.live import MODEL, LiveServer

USER: Any = [{"role": "user", "content": "Name three rivers in Europe."}]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.http + "/v1", api_key="x", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_chat_stream_equals_whole(client: openai.OpenAI) -> None:
    body: Any = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**body)
    stream = client.chat.completions.create(
        **body, stream=True, stream_options={"include_usage": True}
    )
    text, reasons, usage = "", [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content
    assert text
    assert reasons == [whole.choices[0].finish_reason]
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_completion_knows_paris(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=5)
    assert "Paris" in answer.choices[0].text


def test_echo_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=3, echo=True, logprobs=2
    )
    (choice,) = answer.choices
    assert choice.text.startswith(PROMPT)
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.top_logprobs is not None
    # Greedy tokens are the best of their position.
    for token, top in list(zip(logprobs.tokens, logprobs.top_logprobs, strict=True))[-3:]:
        assert max(top, key=lambda name: top[name]) == token


def test_seeds_and_n(client: openai.OpenAI) -> None:
    body: Any = {"model": MODEL, "prompt": PROMPT, "temperature": 1.5, "max_tokens": 8, "n": 3}
    first = [c.text for c in client.completions.create(**body, seed=7).choices]
    again = [c.text for c in client.completions.create(**body, seed=7).choices]
    other = [c.text for c in client.completions.create(**body, seed=8).choices]
    assert first == again
    assert first != other
    assert len(set(first)) > 1


def test_stop(client: openai.OpenAI) -> None:
    body: Any = {"model": MODEL, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 20}
    (free,) = client.completions.create(**body).choices
    (stopped,) = client.completions.create(**body, stop=[" 7"]).choices
    assert " 7" in free.text
    assert stopped.text == free.text.partition(" 7")[0]
    assert stopped.finish_reason == "stop"


def test_prompts_in_batches_and_as_ids(client: openai.OpenAI, live: LiveServer) -> None:
    prompts = [PROMPT, "Water boils at", "Once upon a time"]
    body: Any = {"model": MODEL, "temperature": 0, "max_tokens": 6}
    together = client.completions.create(prompt=prompts, **body)
    alone = [client.completions.create(prompt=p, **body).choices[0].text for p in prompts]
    assert [choice.text for choice in together.choices] == alone
    ids = openai_ids(live, PROMPT)
    assert client.completions.create(prompt=ids, **body).choices[0].text == alone[0]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token


def test_errors_have_the_sdk_s_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a" * 5000)
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=USER, max_tokens=5000)
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=USER,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "strin"}},
            },
        )
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[49152])
    assert "vocabulary" in str(caught.value)


def openai_ids(live: LiveServer, text: str) -> list[int]:
    from tests.server.harness import post

    return post(live.http + "/tokenize", {"prompt": text})[1]["tokens"]
