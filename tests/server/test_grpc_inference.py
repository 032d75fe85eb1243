"""jengine.v1 through the client and through bare stubs, on the echo core."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jengine.client import AsyncClient, CallOptions, Client, RpcFailedError, collect
from jengine.client.convert import generate_request
from jengine.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
)
from jengine.request import RepetitionDetectionParams
from jengine.server.inference_convert import to_sampling_params
from jengine.server.proto import engine_pb2 as pb
from jengine.server.proto import engine_pb2_grpc
from tests.server.harness import RunningServer, echo_server

EURO = "€😀"


def test_generate_text_and_ids(server: RunningServer) -> None:
    with Client(server.grpc) as client:
        deltas = list(client.generate("ab", temperature=0, max_tokens=5))
        (whole,) = collect(client.generate([97, 98], temperature=0, max_tokens=5))
    (joined,) = collect(deltas)
    assert (joined.text, joined.token_ids) == ("ababa", [97, 98, 97, 98, 97])
    assert (whole.text, whole.token_ids) == (joined.text, joined.token_ids)
    assert deltas[0].prompt is not None
    assert deltas[0].prompt.num_tokens == 2
    assert all(delta.prompt is None for delta in deltas[1:])
    assert [delta.finish is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    finish = joined.finish
    assert finish is not None
    assert (finish.reason, finish.stop) == ("length", None)
    assert (finish.prompt_tokens, finish.completion_tokens, finish.cached_tokens) == (2, 5, 3)
    assert finish.queue_seconds is not None
    assert finish.time_to_first_token is not None
    assert finish.total_seconds is not None
    assert 0 <= finish.queue_seconds <= finish.time_to_first_token <= finish.total_seconds


def test_defaults_are_those_of_sampling_params(server: RunningServer) -> None:
    """Nothing set: 16 tokens at temperature 1, whatever the model suggests and whatever proto zero
    is.
    """
    with Client(server.grpc) as client:
        (drawn,) = collect(client.generate("ab"))
        (again,) = collect(client.generate("ab", seed=3))
        (same,) = collect(client.generate("ab", seed=3))
    assert len(drawn.token_ids) == 16
    assert drawn.text != "abababababababab"
    assert again.text == same.text


def test_chat_runs_to_the_model_s_length(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with Client(server.grpc) as client:
        (short,) = collect(client.chat(messages, temperature=0, max_tokens=6))
        (full,) = collect(client.chat(messages, temperature=0))
    assert short.text == "[user]"
    assert full.finish is not None
    assert full.finish.prompt_tokens + full.finish.completion_tokens == 256


def test_stops(server: RunningServer) -> None:
    with Client(server.grpc) as client:
        (text,) = collect(client.generate("abcdef", temperature=0, stop="de"))
        (token,) = collect(client.generate("abcdef", temperature=0, stop_token_ids=[100]))
        (eos,) = collect(client.generate([97, 256], temperature=0))
    assert text.finish is not None and token.finish is not None and eos.finish is not None
    assert (text.text, text.finish.reason, text.finish.stop) == ("abc", "stop", "de")
    assert (token.finish.reason, token.finish.stop) == ("stop", 100)
    assert (eos.finish.reason, eos.finish.stop) == ("stop", None)


def test_repetition_ends_with_its_own_reason(server: RunningServer) -> None:
    detection = RepetitionDetectionParams(max_pattern_size=4, min_count=3)
    with Client(server.grpc) as client:
        (round_and_round,) = collect(
            client.generate("abc", temperature=0, repetition_detection=detection)
        )
        (off,) = collect(
            client.generate("abc", temperature=0, repetition_detection={"max_pattern_size": 0})
        )
    assert round_and_round.text == "abcabcabc"
    assert round_and_round.finish is not None and off.finish is not None
    assert (round_and_round.finish.reason, round_and_round.finish.stop) == ("repetition", None)
    assert (off.finish.reason, len(off.token_ids)) == ("length", 16)


def test_extra_args_keep_their_types() -> None:
    """Whole numbers stay whole, which protobuf's own struct would not keep."""
    extra_args = {"a": 3, "b": 3.0, "c": [True, 2**63], "d": {"e": None}}
    message = generate_request("a", CallOptions(), {"extra_args": extra_args}).sampling
    got = to_sampling_params(message, pb.OutputOptions()).extra_args
    assert repr(got) == repr(extra_args)


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ("[1]", "extra_args_json", "must be a JSON object"),
        ("", "extra_args_json", "is not JSON"),
        ('{"a": NaN}', "extra_args_json", "is not JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "extra_args_json", "is nested too deeply"),
        ('{"a": 1}', "extra_args", "no logits processor of this engine takes 'a'"),
    ],
)
def test_bad_extra_args(server: RunningServer, text: str, field: str, reason: str) -> None:
    with Client(server.grpc) as client, pytest.raises(InvalidRequestError) as caught:
        list(client.generate("a", extra_args_json=text))
    assert caught.value.field == field
    assert caught.value.message.startswith(reason)


def test_logprobs_and_prompt(server: RunningServer) -> None:
    options = CallOptions(prompt_token_ids=True, request_id="mine")
    with Client(server.grpc) as client:
        first, *_ = deltas = list(
            client.generate("ab", options, temperature=0, logprobs=2, prompt_logprobs=1)
        )
    (joined,) = collect(deltas)
    assert {delta.request_id for delta in deltas} == {"mine"}
    assert first.prompt is not None
    assert first.prompt.token_ids == (97, 98)
    assert [len(position) for position in first.prompt.logprobs] == [0, 2]
    assert len(joined.logprobs) == 16
    chosen, best = joined.logprobs[1]
    assert (chosen.token_id, chosen.token, chosen.logprob, chosen.rank) == (98, "b", -0.5, 2)
    assert (best.token_id, best.logprob, best.rank) == (97, -0.25, 1)


def test_logprobs_of_named_tokens(server: RunningServer) -> None:
    with Client(server.grpc) as client:
        (joined,) = collect(
            client.generate("ab", temperature=0, max_tokens=2, logprob_token_ids=[120, 97, 8])
        )
    got = [[(c.token_id, c.logprob, c.rank) for c in position] for position in joined.logprobs]
    others = [(120, -15.0, 121), (8, -1.0, 9)]
    assert [sorted(position) for position in got] == [
        sorted([(97, -0.5, 2), *others]),
        sorted([(98, -0.5, 2), (97, -12.125, 98), *others]),
    ]
    assert [position[0][0] for position in got] == [97, 98], "the chosen one first"


def test_n_interleaves_and_final_only_does_not(server: RunningServer) -> None:
    with Client(server.grpc) as client:
        streamed = collect(client.generate("ab", n=3, seed=4, max_tokens=6))
        finals = list(
            client.generate("ab", CallOptions(final_only=True), n=3, seed=4, max_tokens=6)
        )
    assert [c.index for c in streamed] == [0, 1, 2]
    assert [(f.index, f.text) for f in finals] == [(c.index, c.text) for c in streamed]
    assert all(final.finish is not None for final in finals)


def test_output_options_leave_things_out(server: RunningServer) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = engine_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(text="ab")
        request.sampling.temperature = 0
        request.output.text = False
        responses = list(stub.Generate(request))
        assert "".join(r.text for r in responses) == ""
        assert sum(len(r.token_ids) for r in responses) == 16
        request.output.text = True
        request.output.token_ids = False
        responses = list(stub.Generate(request))
        assert "".join(r.text for r in responses) == "ab" * 8
        assert sum(len(r.token_ids) for r in responses) == 0


def test_tokenize_detokenize_info(server: RunningServer) -> None:
    with Client(server.grpc) as client:
        ids = client.tokenize(EURO)
        assert ids == list(EURO.encode())
        assert client.detokenize(ids) == EURO
        info = client.server_info()
    assert info.served_names == ("echo", "alias")
    assert (info.vocab_size, info.max_model_len, info.eos_token_ids) == (258, 256, (256,))
    assert info.default_sampling_params["temperature"] == 0.0
    assert info.limits["num_pages"] == 8
    assert info.memory_plan == "echo"


def test_tokenize_a_conversation(server: RunningServer) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = engine_pb2_grpc.InferenceStub(channel)
        request = pb.TokenizeRequest(return_tokens=True)
        request.conversation.messages.add(role="user", content="x")
        answer = stub.Tokenize(request)
    assert bytes(answer.token_ids) == b"[user]x[assistant]"
    assert "".join(answer.tokens) == "[user]x[assistant]"
    assert answer.max_model_len == 256


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ("", {}, "prompt"),
        ([], {}, "prompt"),
        ([258], {}, "prompt_token_ids"),
        ("a" * 256, {}, "prompt"),
        ("a", {"n": 129}, "n"),
        ("a", {"n": 2, "temperature": 0}, "n"),
        ("a", {"temperature": -1}, "temperature"),
        ("a", {"top_p": 0}, "top_p"),
        ("a", {"max_tokens": 0}, "max_tokens"),
        ("a", {"logprobs": 21}, "logprobs"),
        ("a", {"logprobs": -1}, "logprobs"),
        ("a", {"thinking_token_budget": 3}, "thinking_token_budget"),
        ("a", {"logprob_token_ids": [300]}, "logprob_token_ids"),
        ("a", {"logprob_token_ids": [3] * 129}, "logprob_token_ids"),
        ("a", {"logprob_token_ids": [3], "logprobs": 2}, "logprob_token_ids"),
        ("a", {"logit_bias": {300: 1.0}}, "logit_bias"),
        ("a", {"stop_token_ids": [300]}, "stop_token_ids"),
        ("a", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("a", {"repetition_detection": {"max_pattern_size": 513}}, "repetition_detection"),
        ("a", {"repetition_detection": {"max_pattern_size": 2}}, "repetition_detection"),
        ("a", {"repetition_detection": {"min_pattern_size": 2}}, "repetition_detection"),
        ("a", {"repetition_detection": {"min_count": -1}}, "sampling"),
        ("a", {"extra_args": {"a": {1, 2}}}, "sampling"),
        ("a", {"no_such_field": 1}, "sampling"),
        ("a", {"max_tokens": "many"}, "sampling"),
        ([2**40], {}, "prompt"),
    ],
)
def test_bad_fields_come_back_by_name(
    server: RunningServer, prompt: str | list[int], sampling: dict, field: str
) -> None:
    with Client(server.grpc) as client:
        with pytest.raises(InvalidRequestError) as caught:
            list(client.generate(prompt, **sampling))
        assert caught.value.field == field
        assert collect(client.generate("ab", temperature=0, max_tokens=1))[0].text == "a"


def test_other_errors_keep_their_class(slow_server: RunningServer) -> None:
    with Client(slow_server.grpc) as client:
        with pytest.raises(ModelNotFoundError):
            list(client.generate("a", CallOptions(model="other")))
        with pytest.raises(InvalidRequestError, match="messages"):
            list(client.chat([]))
        options = CallOptions(request_id="twice")
        running = client.generate("a", options, max_tokens=200, temperature=0)
        next(running)
        with pytest.raises(DuplicateRequestError):
            list(client.generate("a", options))
        running.close()  # type: ignore[attr-defined]
        with pytest.raises(TimeoutError):
            list(client.generate("a", CallOptions(timeout=0.1), max_tokens=200, temperature=0))
    slow_server.wait_idle()


def test_full_queue(echo_model: Path) -> None:
    behaviour = {"step_seconds": 0.01}
    with (
        echo_server(echo_model, behaviour=behaviour, max_num_waiting=1) as server,
        Client(server.grpc) as client,
    ):
        running = client.generate("a", max_tokens=200, temperature=0)
        next(running)
        with pytest.raises(QueueFullError):
            list(client.generate("a"))
        running.close()  # type: ignore[attr-defined]


def test_keys(echo_model: Path) -> None:
    with echo_server(echo_model, api_keys=("sesame",)) as server:
        for key in (None, "wrong"):
            with Client(server.grpc, api_key=key) as client:
                with pytest.raises(RpcFailedError, match="UNAUTHENTICATED"):
                    client.server_info()
                with pytest.raises(RpcFailedError, match="UNAUTHENTICATED"):
                    list(client.generate("a"))
        with grpc.insecure_channel(server.grpc) as channel:  # probes need none
            stub: Any = health_pb2_grpc.HealthStub(channel)
            assert stub.Check(health_pb2.HealthCheckRequest()).status
        with Client(server.grpc, api_key="sesame") as client:
            assert collect(client.generate("ab", temperature=0, max_tokens=2))[0].text == "ab"


def test_async_client(server: RunningServer) -> None:
    async def use() -> None:
        async with AsyncClient(server.grpc) as client:
            text = ""
            async for delta in client.generate("ab", temperature=0, max_tokens=4):
                text += delta.text
            assert text == "abab"
            assert await client.tokenize("ab") == [97, 98]
            assert await client.detokenize([97]) == "a"
            assert (await client.server_info()).vocab_size == 258
            with pytest.raises(InvalidRequestError):
                async for _ in client.generate(""):
                    pass

    asyncio.run(use())
