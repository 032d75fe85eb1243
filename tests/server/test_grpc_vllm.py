"""VllmEngine through the stubs of the published package, on the echo core."""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from jengine.server.grpc_server import SERVICE_NAMES
from tests.server.harness import RunningServer


@pytest.fixture
def stub(server: RunningServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield vllm_engine_pb2_grpc.VllmEngineStub(channel)


def request(ids: list[int], *, stream: bool = False, **sampling: Any) -> pb.GenerateRequest:
    sampling = {"temperature": 0.0, "max_tokens": 6, **sampling}
    return pb.GenerateRequest(
        request_id=sampling.pop("request_id", ""),
        tokenized=pb.TokenizedInput(input_ids=ids),
        sampling_params=pb.SamplingParams(**sampling),
        stream=stream,
    )


def test_final_only(stub: Any) -> None:
    (response,) = stub.Generate(request([97, 98], logprobs=1, prompt_logprobs=0))
    complete = response.complete
    assert list(complete.output_ids) == [97, 98] * 3
    assert complete.finish_reason == "length"
    assert complete.WhichOneof("matched_stop") is None
    counts = complete.prompt_tokens, complete.completion_tokens, complete.cached_tokens
    assert counts == (2, 6, 3)
    logprobs = complete.output_logprobs
    assert list(logprobs.token_ids) == [97, 98] * 3
    assert list(logprobs.token_logprobs) == [-0.5] * 6
    assert list(logprobs.top_logprobs[1].token_ids) == [97, 98], "best first"
    assert not complete.input_logprobs.token_logprobs[0].HasField("value")
    assert complete.input_logprobs.token_logprobs[1].value == -0.5


def test_stream(stub: Any) -> None:
    responses = list(stub.Generate(request([97, 98], stream=True, logprobs=0, prompt_logprobs=0)))
    chunks = [r.chunk for r in responses if r.WhichOneof("response") == "chunk"]
    (complete,) = [r.complete for r in responses if r.WhichOneof("response") == "complete"]
    assert responses[-1].WhichOneof("response") == "complete"
    assert [i for chunk in chunks for i in chunk.token_ids] == [97, 98] * 3
    assert all(chunk.completion_tokens == len(chunk.token_ids) for chunk in chunks)
    assert [i for c in chunks for i in c.output_logprobs.token_ids] == [97, 98] * 3
    assert list(chunks[0].input_logprobs.token_ids) == [97, 98]
    assert not any(chunk.HasField("input_logprobs") for chunk in chunks[1:])
    assert list(complete.output_ids) == [], "the chunks had them"
    assert complete.completion_tokens == 6


def test_choices_have_a_complete_each(stub: Any) -> None:
    for stream in (True, False):
        sent = request([97], stream=stream, n=3, temperature=1.0, seed=2)
        responses = list(stub.Generate(sent))
        ends = [r.complete for r in responses if r.WhichOneof("response") == "complete"]
        assert sorted(end.index for end in ends) == [0, 1, 2]


def test_text_and_stops(stub: Any) -> None:
    sent = request([], stop=["cd"])
    sent.text = "abcdef"
    (response,) = stub.Generate(sent)
    assert response.complete.finish_reason == "stop"
    assert response.complete.matched_stop_str == "cd"
    (response,) = stub.Generate(request(list(b"abc"), stop_token_ids=[98]))
    assert response.complete.matched_token_id == 98
    (response,) = stub.Generate(request([97, 256]))
    assert response.complete.finish_reason == "stop"
    assert response.complete.WhichOneof("matched_stop") is None


def test_proto_zeros_mean_defaults(stub: Any) -> None:
    """top_p 0 is 1, repetition_penalty 0 is 1, n 0 is 1; no temperature is 1; no max_tokens is all
    there is.
    """
    sent = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[97, 98]))
    (response,) = stub.Generate(sent)
    assert response.complete.completion_tokens == 254
    assert list(response.complete.output_ids) != [97, 98] * 127


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        (pb.GenerateRequest(), "input"),
        (request([]), "prompt"),
        (request([258]), "prompt_token_ids"),
        (request([97] * 256), "prompt"),
        (request([97], n=129, temperature=1.0), "n"),
        (request([97], logprobs=-1), "logprobs"),
        (request([97], temperature=-1.0), "temperature"),
        (request([97], logit_bias={300: 1.0}), "logit_bias"),
        (request([97], json_schema="{"), "sampling_params.json_schema"),
        (request([97], json_schema='{"type": "x"}'), "sampling_params.json_schema"),
        (request([97], regex="(a"), "sampling_params.regex"),
        (request([97], grammar="start: x"), "sampling_params.grammar"),
        (request([97], structural_tag="{}"), "sampling_params.structural_tag"),
        (request([97], choice=pb.ChoiceConstraint()), "sampling_params.choice"),
        (pb.GenerateRequest(text="a", mm_inputs=pb.MultimodalInputs()), "mm_inputs"),
        (pb.GenerateRequest(text="a", media_refs=pb.MediaRefs()), "media_refs"),
        (pb.GenerateRequest(text="a", kv_transfer_params_json="{}"), "kv_transfer_params_json"),
        (pb.GenerateRequest(text="a", data_parallel_rank=1), "data_parallel_rank"),
        (request([97], request_id="a b"), "request_id"),
    ],
)
def test_bad_requests_carry_details(stub: Any, sent: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(sent))
    call: Any = caught.value
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailer = dict(call.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(trailer)
    assert status.code == 3
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert [violation.field for violation in bad.field_violations] == [field]


def test_facts(stub: Any, server: RunningServer) -> None:
    model = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (model.served_model_name, model.vocab_size) == ("echo", 258)
    assert (model.max_context_length, model.max_req_input_len) == (256, 255)
    assert list(model.eos_token_ids) == [256]
    assert json.loads(model.default_sampling_params_json) == {"temperature": 0.0}
    assert model.is_generation and not model.supports_vision
    info = stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.server_type, info.block_size, info.data_parallel_size) == ("vllm-grpc", 16, 1)
    assert info.max_num_seqs == server.app.state.config.scheduler.max_num_seqs
    (load,) = stub.GetLoads(pb.GetLoadsRequest()).loads
    assert (load.num_total_reqs, load.max_running_requests) == (0, info.max_num_seqs)
    assert stub.HealthCheck(pb.HealthCheckRequest()).healthy
    with pytest.raises(grpc.RpcError):
        stub.GetLoads(pb.GetLoadsRequest(dp_rank=1))


def test_tokenizer_bundle(stub: Any, server: RunningServer) -> None:
    chunks = list(stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
    data = b"".join(chunk.data for chunk in chunks)
    assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    folder = server.engine.model_info.tokenizer_folder
    assert folder is not None
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        assert {"tokenizer.json", "tokenizer_config.json"} <= set(names)
        for name in names:
            assert archive.read(name) == (folder / name).read_bytes()


def test_flush_cache(stub: Any, slow_server: RunningServer) -> None:
    assert stub.FlushCache(common_pb2.FlushCacheRequest()).success
    with grpc.insecure_channel(slow_server.grpc) as channel:
        busy: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        call = busy.Generate(request([97], stream=True, max_tokens=60))
        next(call)
        refused = busy.FlushCache(common_pb2.FlushCacheRequest())
        assert (refused.success, refused.message) == (False, "1 requests are running")
        assert busy.FlushCache(common_pb2.FlushCacheRequest(timeout_s=10.0)).success


@pytest.mark.parametrize(
    ("method", "sent"),
    [
        ("Embed", pb.EmbedRequest()),
        ("StartProfile", common_pb2.StartProfileRequest()),
        ("StopProfile", common_pb2.StopProfileRequest()),
        ("SubscribeKvEvents", common_pb2.SubscribeKvEventsRequest()),
    ],
)
def test_what_is_not_implemented_says_why(stub: Any, method: str, sent: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        answer = getattr(stub, method)(sent)
        list(answer)
    call: Any = caught.value
    assert call.code() is grpc.StatusCode.UNIMPLEMENTED
    assert len(call.details()) > 20


def test_every_rpc_of_the_package_is_answered_here() -> None:
    """A method that a newer package adds must be looked at."""
    from jengine.server.vllm_service import VllmEngineService

    methods = {m.name for m in pb.DESCRIPTOR.services_by_name["VllmEngine"].methods}
    assert methods <= set(vars(VllmEngineService))


def test_health_and_reflection(server: RunningServer) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", *SERVICE_NAMES):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([asked]))
        names = {service.name for service in answer.list_services_response.service}
    assert names >= {*SERVICE_NAMES, "grpc.health.v1.Health"}


def test_message_limit(server: RunningServer) -> None:
    """A million ids pass the port (and are refused for their number); 64 MiB do not."""
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.grpc, options) as channel:
        stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request([97] * 1_000_000)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        huge = pb.GenerateRequest(text="a" * (64 * 1024 * 1024 + 1))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(huge))
        # type: ignore[attr-defined]
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
