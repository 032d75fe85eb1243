"""Constraints through every protocol of a live server, and hostile ones beside a stream."""

import json
import re
import threading
import time
from typing import Any

import grpc
import openai
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

from jengine import StructuredOutputsParams
from jengine.client import Client, collect
from jengine.errors import InvalidRequestError
from tests.e2e.live import MODEL, LiveServer
from tests.oracles.grammars import HOSTILE, PERSON, compact, satisfies
from tests.server.harness import events, get, post

PROMPT = "Write a record of a person: "
USER: list[Any] = [{"role": "user", "content": "Who are you? Answer in JSON."}]
DATE = r"\d{4}-\d{2}-\d{2}"
BOUND = {"temperature": 1.0, "max_tokens": 150}


@pytest.fixture(scope="module")
def client(live: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.http}/v1", api_key="none", max_retries=0)


def test_response_formats_over_the_openai_sdk(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"disable_any_whitespace": True}}
    formats: list[Any] = [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}},
    ]
    for response_format in formats:
        for seed in range(3):
            answer = client.chat.completions.create(
                model=MODEL,
                messages=USER,
                response_format=response_format,
                extra_body=extra,
                seed=seed,
                temperature=1.0,
                max_tokens=150,
            )
            (choice,) = answer.choices
            if choice.finish_reason == "stop":
                value = json.loads(choice.message.content or "")
                assert isinstance(value, dict)
            if response_format["type"] == "json_schema":
                assert choice.finish_reason == "stop"
                assert satisfies(compact(PERSON), choice.message.content or "")


def test_a_stream_is_whole(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        stream=True,
        seed=1,
        max_tokens=150,
        extra_body={"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}},
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert chunks[-1].finish_reason == "stop"
    assert satisfies(compact(PERSON), "".join(chunk.text for chunk in chunks))


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": DATE}, DATE),
        ({"choice": ["red", "green"]}, "red|green"),
        ({"grammar": 'start: "v" /[0-9]{1,3}/'}, r"v\d{1,3}"),
        ({"json": {"enum": [1, "two"]}}, r'1|"two"'),
        ({"json": json.dumps({"enum": [1, "two"]})}, r'1|"two"'),
    ],
)
def test_the_extra_field_of_vllm(live: LiveServer, fields: dict[str, Any], pattern: str) -> None:
    body = {"prompt": PROMPT, "structured_outputs": fields, "n": 4, "seed": 7, **BOUND}
    status, answer, _ = post(live.http + "/v1/completions", body)
    assert status == 200, answer
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, choice["text"]), choice["text"]


def test_our_grpc_service(live: LiveServer) -> None:
    constraints = [
        compact(PERSON),
        StructuredOutputsParams(regex=DATE),
        StructuredOutputsParams(choice=["left", "right"]),
    ]
    with Client(live.grpc) as client:
        for constraint in constraints:
            (ours,) = collect(client.generate(PROMPT, structured_outputs=constraint, **BOUND))
            assert ours.finish is not None and ours.finish.reason == "stop"
            assert satisfies(constraint, ours.text)
        (ours,) = collect(
            client.chat(USER, structured_outputs={"json_object": True}, temperature=0, max_tokens=9)
        )
        assert ours.text.startswith("{")
        with pytest.raises(InvalidRequestError) as caught:
            collect(client.generate(PROMPT, structured_outputs={"regex": "(a"}))
        assert caught.value.field == "structured_outputs.regex"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": DATE}, DATE),
        ({"choice": pb.ChoiceConstraint(choices=["red", "green"])}, "red|green"),
        ({"grammar": 'root ::= "v" [0-9]'}, r"v\d"),
        ({"json_schema": '{"enum": [1, "two"]}'}, r'1|"two"'),
        ({"json_schema": '{"enum": [1, "two"]}', "grammar_from_first_token": True}, r'1|"two"'),
    ],
)
def test_the_service_of_vllm(live: LiveServer, fields: dict[str, Any], pattern: str) -> None:
    with Client(live.grpc) as client, grpc.insecure_channel(live.grpc) as channel:
        stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        params = pb.SamplingParams(temperature=1.0, max_tokens=50, **fields)
        tokenized = pb.TokenizedInput(input_ids=client.tokenize(PROMPT))
        request = pb.GenerateRequest(tokenized=tokenized, sampling_params=params)
        (response,) = stub.Generate(request)
        assert response.complete.finish_reason == "stop"
        text = client.detokenize(response.complete.output_ids)
        assert re.fullmatch(pattern, text), text


def test_the_service_of_vllm_names_its_own_field(live: LiveServer) -> None:
    with grpc.insecure_channel(live.grpc) as channel:
        stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        params = pb.SamplingParams(json_schema='{"type": "strin"}')
        tokenized = pb.TokenizedInput(input_ids=[5, 6])
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(tokenized=tokenized, sampling_params=params)))
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "sampling_params.json_schema: Invalid type: strin" in error.details()


def test_hostile_constraints_beside_a_stream(live: LiveServer) -> None:
    body = {"prompt": PROMPT, "max_tokens": 300, "temperature": 0, "ignore_eos": True}
    expected = post(live.http + "/v1/completions", body)[1]["choices"][0]["text"]
    answers: dict[str, tuple[int, Any]] = {}

    def attack() -> None:
        for name, (fields, _) in HOSTILE.items():
            hostile = {"prompt": "a", "max_tokens": 20, "structured_outputs": fields}
            status, answer, _ = post(live.http + "/v1/completions", hostile)
            answers[name] = status, answer

    attacker = threading.Thread(target=attack)
    attacker.start()
    started = time.monotonic()
    text = ""
    while attacker.is_alive() or not text:
        text = "".join(
            event["choices"][0]["text"]
            for event in events(live.http + "/v1/completions", {**body, "stream": True})
            if event != "[DONE]" and event["choices"]
        )
        assert text == expected
    assert time.monotonic() - started < 120
    for name, (fields, is_refused) in HOSTILE.items():
        status, answer = answers[name]
        assert status in ((400,) if is_refused else (200, 400)), (name, answer)
        if status == 400:
            error = answer["error"]
            kind = next(iter(fields))
            assert (error["type"], error["param"]) == (
                "BadRequestError",
                f"structured_outputs.{kind}",
            )
    live.wait_idle()


def test_a_body_nested_beyond_any_stack(live: LiveServer) -> None:
    body = {"prompt": "a", "structured_outputs": {"json": "@"}}
    for depth in (200, 450, 900, 20_000):  # Python's limit of recursion is 1,000
        deep = '{"items":' * depth + "{}" + "}" * depth
        text = json.dumps(body).replace('"@"', deep)
        status, answer, _ = post(live.http + "/v1/completions", text.encode())
        assert status == 400, answer
    tag = {"type": "structural_tag", "triggers": ["<"], "structures": "@"}
    for depth in (450, 900):
        deep = '{"items":' * depth + "{}" + "}" * depth
        text = json.dumps({"prompt": "a", "response_format": tag}).replace('"@"', deep)
        status, answer, _ = post(live.http + "/v1/completions", text.encode())
        assert (status, answer["error"]["code"]) == (400, 400)


def test_metrics_count_grammars(live: LiveServer) -> None:
    text = get(live.http + "/metrics")[1]
    for name in ("grammars_compiled", "grammar_masks", "grammar_mask_seconds"):
        (value,) = re.findall(rf"^jengine:{name}_total{{.*}} (\S+)$", text, re.MULTILINE)
        assert float(value) > 0
