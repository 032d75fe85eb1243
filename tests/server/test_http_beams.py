"""`use_beam_search` on the echo core, whose candidates are the same at every step: the prompt's
first token at -0.5, and its best ones.
"""

import asyncio
import http.client
import itertools
import json
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from jengine.beam_search import BeamSearchParams, search_beams
from jengine.outputs import CompletionOutput, Logprob, RequestOutput
from tests.oracles.echo_core import EOS_ID
from tests.server.harness import RunningServer, post, wait_for

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BEAMS = {"use_beam_search": True, "n": 2, "max_tokens": 3, "ignore_eos": True}
SCORES = {"b": -0.25, "a": -0.5, "c": -0.75, "d": -1.0}  # after a prompt that begins with "a"


def ask(server: RunningServer, path: str = COMPLETIONS, **body: object) -> dict[str, Any]:
    status, answer, _ = post(server.http + path, BEAMS | body)
    assert status == 200, answer
    return answer


def test_the_beams_are_the_best_texts(server: RunningServer) -> None:
    answer = ask(server, prompt="ax", logprobs=4, return_token_ids=True, temperature=0, top_p=0.5)
    choices = answer["choices"]
    sums = [sum(SCORES[c] for c in text) for text in itertools.product(SCORES, repeat=3)]
    got = [sum(choice["logprobs"]["token_logprobs"]) for choice in choices]
    assert got == sorted(sums, reverse=True)[:2]
    assert choices[0]["text"] == "bbb"
    for index, choice in enumerate(choices):
        assert (choice["index"], choice["finish_reason"]) == (index, "length")
        assert bytes(choice["token_ids"]).decode() == choice["text"]
        assert choice["logprobs"]["top_logprobs"] == [SCORES] * 3
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 6)
    two = ask(server, prompt=["ax", "ay"], echo=True, logprobs=None)["choices"]
    assert [choice["index"] for choice in two] == [0, 1, 2, 3]
    assert [choice["text"][:2] for choice in two] == ["ax", "ax", "ay", "ay"]
    assert [choice["text"][2:] for choice in two[:2]] == [choice["text"] for choice in choices]
    assert not server.utility("running")


def test_a_conversation(server: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    (choice,) = ask(server, CHAT, **body, n=1, logprobs=True, top_logprobs=1)["choices"]
    assert choice["message"] == {"role": "assistant", "content": "aaa"}
    assert [[t["token"] for t in p["top_logprobs"]] for p in choice["logprobs"]["content"]] == (
        [["a"]] * 3
    )
    answer = ask(server, CHAT, **body, max_tokens=None)
    assert answer["usage"]["completion_tokens"] == 2 * 7, "the model's suggestion"


@pytest.mark.parametrize(("penalty", "text", "reason"), [(1.0, "aa", "length"), (-2.0, "", "stop")])
def test_ends_compete_by_length(
    server: RunningServer, penalty: float, text: str, reason: str
) -> None:
    """Scores of [end], [a, end], [a, a] after 2 tokens: -0.5, -0.75, -0.5 by the power of 2, 3, 4
    tokens."""
    body = {"n": 1, "max_tokens": 2, "ignore_eos": False, "length_penalty": penalty}
    prompt = [EOS_ID, 120]
    (choice,) = ask(server, **body, prompt=prompt, return_token_ids=True)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, reason)
    assert choice["token_ids"] == ([EOS_ID] if reason == "stop" else [97, 97])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stream": True}, "stream"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),  # half of 20 log-probabilities
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 256}, "max_tokens"),
        ({"length_penalty": 1e300}, "length_penalty"),
        ({"stop": "x"}, "stop"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [999]}, "prompt_token_ids"),
    ],
)
def test_what_a_search_cannot_do_is_named(
    server: RunningServer, changes: dict[str, object], field: str
) -> None:
    status, answer, _ = post(server.http + COMPLETIONS, BEAMS | {"prompt": "ab"} | changes)
    assert (status, answer["error"]["param"]) == (400, field), answer


def test_whoever_hangs_up_ends_the_search(slow_server: RunningServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", slow_server.app.http_port or 0)
    body = json.dumps(BEAMS | {"prompt": "ab", "max_tokens": 200})  # a second
    connection.request("POST", COMPLETIONS, body, {"content-type": "application/json"})
    wait_for(lambda: slow_server.app.state.num_active == 1, 5.0)
    time.sleep(0.05)
    before = time.monotonic()
    connection.close()
    slow_server.wait_idle()
    assert time.monotonic() - before < 0.5


def test_a_beam_that_fails_ends_the_search() -> None:
    closed: list[str] = []

    async def generate(
        prompt: Any, params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        tokens = prompt["prompt_token_ids"]
        candidates = {i: Logprob(-float(i), i) for i in (1, 2)}
        answer = CompletionOutput(0, "", [1], logprobs=[candidates], finish_reason="length")
        if tokens[-1] == 2:
            answer = CompletionOutput(0, "", [], logprobs=[], finish_reason="error")
        try:
            yield RequestOutput(request_id, None, tokens, None, [answer], True)
        finally:
            closed.append(request_id)

    async def search() -> list[RequestOutput]:
        engine: Any = SimpleNamespace(
            generate=generate, model_info=SimpleNamespace(eos_token_ids=())
        )
        params = BeamSearchParams(beam_width=2, max_tokens=4)
        return [output async for output in search_beams(engine, [5], params, "it")]

    (output,) = asyncio.run(search())
    assert [(c.finish_reason, c.token_ids) for c in output.outputs] == [("error", [])]
    assert output.finished and closed == ["it-0-0", "it-1-0", "it-1-1"]
