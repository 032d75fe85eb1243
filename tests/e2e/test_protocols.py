"""One engine behind three protocols: the same ids from all, nothing left behind by any."""

import http.client
import json
import random
import threading
import time
from typing import Any

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

from jengine.client import CallOptions, Client, collect
from jengine.errors import InvalidRequestError
from tests.e2e.live import LiveServer
from tests.server.harness import events, post

PROMPTS = ["The capital of France is", "def fibonacci(n):", "Grüße aus 東京 😀: "]


def over_vllm(live: LiveServer, ids: list[int], max_tokens: int) -> list[int]:
    with grpc.insecure_channel(live.grpc) as channel:
        stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        request = pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=ids),
            sampling_params=pb.SamplingParams(temperature=0.0, max_tokens=max_tokens),
            stream=True,
        )
        return [i for response in stub.Generate(request) for i in response.chunk.token_ids]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_three_protocols_give_the_same_ids(live: LiveServer, prompt: str) -> None:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 24, "return_token_ids": True}
    (choice,) = post(live.http + "/v1/completions", body)[1]["choices"]
    with Client(live.grpc) as client:
        (ours,) = collect(client.generate(prompt, temperature=0, max_tokens=24))
        ids = client.tokenize(prompt)
        assert client.detokenize(ids) == prompt
    assert ours.token_ids == choice["token_ids"]
    assert ours.text == choice["text"]
    assert over_vllm(live, ids, 24) == choice["token_ids"]
    assert choice["prompt_token_ids"] == ids


def test_chat_is_the_same_over_grpc_and_http(live: LiveServer) -> None:
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 16}
    answer = post(live.http + "/v1/chat/completions", body)[1]
    with Client(live.grpc) as client:
        (ours,) = collect(client.chat(messages, temperature=0, max_tokens=16))
    assert ours.text == answer["choices"][0]["message"]["content"]
    assert ours.finish is not None
    assert ours.finish.prompt_tokens == answer["usage"]["prompt_tokens"]


def test_a_second_ask_hits_the_prefix_cache(live: LiveServer) -> None:
    prompt = "A prompt that no other test uses, long enough to fill several pages. " * 4
    with Client(live.grpc) as client:
        (first,) = collect(client.generate(prompt, temperature=0, max_tokens=4))
        (second,) = collect(client.generate(prompt, temperature=0, max_tokens=4))
        salted = CallOptions(cache_salt="mine")
        (apart,) = collect(client.generate(prompt, salted, temperature=0, max_tokens=4))
    assert first.finish and second.finish and apart.finish
    assert second.finish.cached_tokens >= 16 > first.finish.cached_tokens
    assert apart.finish.cached_tokens == 0
    assert first.token_ids == second.token_ids == apart.token_ids


def test_malformed_requests_leave_neighbours_unharmed(live: LiveServer) -> None:
    body = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 40}
    expected = post(live.http + "/v1/completions", body)[1]["choices"][0]["text"]
    texts: list[str] = []

    def stream() -> None:
        chunks = events(live.http + "/v1/completions", {**body, "stream": True})
        texts.append("".join(chunk["choices"][0]["text"] for chunk in chunks))

    threads = [threading.Thread(target=stream) for _ in range(3)]
    for thread in threads:
        thread.start()
    bad_http: list[dict[str, Any]] = [
        {"prompt": ""},
        {"prompt": [49152]},
        {"prompt": "a", "n": 10**9},
        {"prompt": "a", "max_tokens": "x"},
        {"prompt": "word " * 600},
        {"prompt": "a", "temperature": -2},
        {"prompt": "a", "logprobs": 1000},
    ]
    for bad in bad_http:
        assert post(live.http + "/v1/completions", bad)[0] == 400
    with Client(live.grpc) as client:
        for prompt in ("", [], [49152], [2**32 - 1], "word " * 600):
            with pytest.raises(InvalidRequestError):
                list(client.generate(prompt))
    for thread in threads:
        thread.join()
    assert texts == [expected] * 3
    live.wait_idle()


def test_cancelled_expired_and_aborted_requests_free_their_pages(live: LiveServer) -> None:
    with Client(live.grpc) as client, grpc.insecure_channel(live.grpc) as channel:
        left = client.generate(PROMPTS[0], max_tokens=400, temperature=0, ignore_eos=True)
        next(left)
        assert live.load()["num_pages_used"] > 0
        left.close()  # type: ignore[attr-defined]
        live.wait_idle(2.0)

        with pytest.raises(TimeoutError):
            list(
                client.generate(
                    PROMPTS[0], CallOptions(timeout=0.4), max_tokens=400, ignore_eos=True
                )
            )
        live.wait_idle(2.0)

        named = CallOptions(request_id="to-be-aborted")
        aborted = client.generate(PROMPTS[0], named, max_tokens=400, ignore_eos=True)
        next(aborted)
        stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        stub.Abort(pb.AbortRequest(request_ids=["to-be-aborted"]))
        *_, last = list(aborted)
        assert last.finish is not None
        assert last.finish.reason == "abort"
        live.wait_idle(2.0)

        connection = http.client.HTTPConnection("127.0.0.1", live.http_port)
        body = {"prompt": PROMPTS[0], "max_tokens": 400, "ignore_eos": True}
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        while not live.load()["num_running"]:
            time.sleep(0.01)
        connection.close()
        live.wait_idle(2.0)


def test_two_hundred_streams_with_random_cancels(live: LiveServer) -> None:
    """Half over gRPC, half over HTTP; half of each leave early. Nothing stays behind."""
    rng = random.Random(1)
    leave_after = [rng.randrange(4) if rng.random() < 0.7 else None for _ in range(200)]
    counts: list[int] = []
    errors: list[BaseException] = []

    def over_grpc(client: Client, limit: int | None, seed: int) -> None:
        stream = client.generate(PROMPTS[seed % 3], max_tokens=6, seed=seed, ignore_eos=True)
        total = 0
        for count, delta in enumerate(stream):
            total += len(delta.token_ids)
            if limit is not None and count >= limit:
                break
        else:
            counts.append(total)
        stream.close()  # type: ignore[attr-defined]

    def over_http(limit: int | None, seed: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", live.http_port, timeout=120)
        body = {"prompt": PROMPTS[seed % 3], "max_tokens": 6, "seed": seed, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        if limit != 0:
            for count, line in enumerate(connection.getresponse()):
                if limit is not None and count >= 2 * limit:
                    break
                if b'"usage"' in line:
                    counts.append(json.loads(line[6:])["usage"]["completion_tokens"])
        connection.close()

    def use(client: Client, limit: int | None, seed: int) -> None:
        try:
            if seed % 2:
                over_grpc(client, limit, seed)
            else:
                over_http(limit, seed)
        except BaseException as error:
            errors.append(error)
            raise

    with Client(live.grpc) as client:
        threads = [
            threading.Thread(target=use, args=(client, limit, seed))
            for seed, limit in enumerate(leave_after)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        live.wait_idle()
        assert counts == [6] * len(counts)
        assert len(counts) >= leave_after.count(None)
        (after,) = collect(client.generate(PROMPTS[0], temperature=0, max_tokens=5))
    assert "Paris" in after.text


def test_nothing_was_compiled_after_warm_up(live: LiveServer) -> None:
    assert live.metric("jengine:steps_total") > 0
    assert live.metric("jengine:compilations_total") == 0


def test_the_log_has_a_line_for_each_request_and_no_text(live: LiveServer) -> None:
    with Client(live.grpc) as client:
        options = CallOptions(request_id="logged")
        list(client.generate("a secret phrase", options, max_tokens=3, temperature=0))
    (record,) = [r for r in live.log_records() if r.get("request_id") == "logged"]
    assert record["output_tokens"] == 3
    assert record["endpoint"] == "grpc.Generate"
    assert 0 < record["ttft_ms"] <= record["e2e_ms"]
    assert "secret" not in live.log.read_text()
