"""gRPC messages: every field of both services with every hostile value, bytes that are no message,
and calls that end before they should.
"""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor as Kind
from google.protobuf.message import Message
from smg_grpc_proto import vllm_engine_pb2 as vllm

from jengine.server.proto import engine_pb2 as ours
from tests.hostile.corpus import SEED, GrpcCase, mutations

GENERATE, CHAT = "/jengine.v1.Inference/Generate", "/jengine.v1.Inference/Chat"
VLLM = "/vllm.grpc.engine.VllmEngine/Generate"
INTEGERS = (0, 1, -1, 2, 129, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
FLOATS = (0.0, -0.0, -1.0, 1.0, 1e-45, 3e38, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    "a",
    "a\0b",
    "\U0001f600\u202e\ufeff",
    "{{ 7 * 7 }}",
    "[" * 100_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    "9" * 5000,
    '"\\ud800"',
    '{"x": "\\ud800\\u0000"}',
    '{"messages": 1}',
    '{"chat_template": "{{ 1 }}"}',
    '{"self": 1, "function": 2}',
    '{"x": NaN}',
    "NaN",
    "a " * 50_000,
    "%s{0}",
)
MANY = 20_000  # entries of repeated fields
INVALID = frozenset({grpc.StatusCode.INVALID_ARGUMENT})


def grpc_cases() -> Iterator[GrpcCase]:
    yield from matrix()
    yield from not_a_message()
    yield from envelopes()
    yield from small_methods()


def bases() -> list[tuple[str, Message]]:
    sampling = ours.SamplingParams(max_tokens=2)
    generate = ours.GenerateRequest(text="ab", sampling=sampling)
    chat = ours.ChatRequest(
        messages=[ours.ChatMessage(role="user", content="ab")],
        sampling=sampling,
        chat_template_kwargs_json='{"x": [1]}',
    )
    engine = vllm.GenerateRequest(
        tokenized=vllm.TokenizedInput(input_ids=[3, 4]),
        sampling_params=vllm.SamplingParams(max_tokens=2),
        stream=True,
    )
    return [(GENERATE, generate), (CHAT, chat), (VLLM, engine)]


def matrix() -> Iterator[GrpcCase]:
    for method, base in bases():
        for name, message in _variants(base):
            yield GrpcCase(f"{method} {name}", method, message.SerializeToString())


def not_a_message() -> Iterator[GrpcCase]:
    """Bytes that came to harm; many still parse, which is fine."""
    rng = random.Random(SEED + 2)
    for method, base in bases():
        valid = base.SerializeToString()
        for number, data in enumerate(mutations(valid, 80, rng)):
            yield GrpcCase(f"{method} mutated {number}", method, data)
        for number in range(40):
            data = rng.randbytes(rng.randrange(1, 200))
            yield GrpcCase(f"{method} noise {number}", method, data)
        yield GrpcCase(f"{method} cut", method, valid[:-1], codes=INVALID)
        yield GrpcCase(f"{method} endless varint", method, b"\xff" * 1000, codes=INVALID)
        yield GrpcCase(f"{method} deep groups", method, b"\x0b" * 100_000, codes=INVALID)
        # A string field that holds no UTF-8: a lone surrogate, an overlong NUL.
        for text in (b"\xed\xa0\x80", b"\xc0\x80", b"\xff"):
            data = valid + b"\x0a" + bytes([len(text)]) + text
            yield GrpcCase(f"{method} text {text!r}", method, data, codes=INVALID)
        yield GrpcCase(f"{method} nothing", method, b"", codes=INVALID)


def envelopes() -> Iterator[GrpcCase]:
    method, base = bases()[0]
    data = base.SerializeToString()
    # The transport refuses, before anybody reads the message.
    too_much = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED})
    for size in (20_000, 200_000):
        metadata = (("x-large", "a" * size),)
        yield GrpcCase(f"{size} bytes of metadata", method, data, metadata, codes=too_much)
    many = tuple((f"x-{i}", "a" * 20) for i in range(2000))
    case = GrpcCase("2000 pairs of metadata", method, data, many, codes=too_much)
    yield dataclasses.replace(case, has_message=False)
    yield GrpcCase("binary metadata", method, data, (("x-bin", b"\0\xff" * 100),))
    late = frozenset({grpc.StatusCode.DEADLINE_EXCEEDED})
    for seconds in (0.0, -1.0, 1e-9):
        yield GrpcCase(f"deadline of {seconds}", method, data, timeout=seconds, codes=late)
    long = ours.GenerateRequest(
        text="ab", sampling=ours.SamplingParams(max_tokens=250, ignore_eos=True)
    )
    for index in range(30):
        seconds = 0.002 * (index + 1)
        yield GrpcCase(f"deadline {index}", method, long.SerializeToString(), timeout=seconds)
    for index in range(30):
        payload = long.SerializeToString()
        yield GrpcCase(f"cancelled after {index}", method, payload, cancel_after=index)
    missing = frozenset({grpc.StatusCode.UNIMPLEMENTED})
    for name in ("/jengine.v1.Inference/Nothing", "/nothing", "/a.b/" + "c" * 2000):
        yield GrpcCase(f"method {name[:30]}", name, data, codes=missing)


def small_methods() -> Iterator[GrpcCase]:
    """One message in, one out."""
    rng = random.Random(SEED + 3)
    service, engine = "/jengine.v1.Inference/", "/vllm.grpc.engine.VllmEngine/"
    calls: list[tuple[str, Message]] = [
        (service + "Tokenize", ours.TokenizeRequest(text="ab", return_tokens=True)),
        (service + "Detokenize", ours.DetokenizeRequest(token_ids=[3])),
        (service + "ServerInfo", ours.ServerInfoRequest()),
        (engine + "Abort", vllm.AbortRequest(request_ids=["a", "\0", "b" * 10_000])),
        (engine + "GetLoads", vllm.GetLoadsRequest(dp_rank=7)),
        (engine + "GetModelInfo", vllm.GetModelInfoRequest()),
        (engine + "HealthCheck", vllm.HealthCheckRequest()),
        (engine + "Embed", vllm.EmbedRequest()),
    ]
    for method, base in calls:
        valid = base.SerializeToString() or b"\x0a\x01a"
        for name, message in _variants(base):
            data = message.SerializeToString()
            yield GrpcCase(f"{method} {name}", method, data, streams=False)
        for number, data in enumerate(mutations(valid, 10, rng)):
            yield GrpcCase(f"{method} mutated {number}", method, data, streams=False)


def _variants(base: Message, depth: int = 0) -> Iterator[tuple[str, Message]]:
    """Copies of `base` with one field changed, at any depth."""
    fields: Any = base.DESCRIPTOR.fields
    for field in fields:
        if field.message_type is None:
            for number, value in enumerate(_values(field)):
                copy = _copy(base)
                if _set(copy, field, value):
                    yield f"{field.name} {number}", copy
        elif not field.is_repeated and depth < 2:
            inner = getattr(base, field.name)
            for name, changed in _variants(inner, depth + 1):
                copy = _copy(base)
                getattr(copy, field.name).CopyFrom(changed)
                yield f"{field.name}.{name}", copy
        elif field.message_type.GetOptions().map_entry:
            yield from _maps(base, field)


def _maps(base: Message, field: Any) -> Iterator[tuple[str, Message]]:
    if field.message_type.fields_by_name["key"].type == Kind.TYPE_STRING:
        return
    value_field = field.message_type.fields_by_name["value"]
    if value_field.message_type is not None:
        return
    for key in (0, 5, 511, 512, 2**31 - 1):
        for number, value in enumerate(_values(value_field)):
            copy = _copy(base)
            try:
                getattr(copy, field.name)[key] = value
            except (ValueError, TypeError):
                continue
            yield f"{field.name}[{key}] {number}", copy
    copy = _copy(base)
    for key in range(20_000):
        getattr(copy, field.name)[key] = 1.0
    yield f"{field.name} of 20000", copy


def _values(field: Any) -> tuple[Any, ...]:
    match field.cpp_type:
        case Kind.CPPTYPE_STRING:
            return TEXTS if field.type == Kind.TYPE_STRING else (b"", b"\xff" * 100)
        case Kind.CPPTYPE_FLOAT | Kind.CPPTYPE_DOUBLE:
            return FLOATS
        case Kind.CPPTYPE_BOOL:
            return (True, False)
        case _:
            return INTEGERS


def _set(message: Message, field: Any, value: Any) -> bool:
    """False if the field cannot hold the value."""
    try:
        if not field.is_repeated:
            setattr(message, field.name, value)
            return True
        count = 1 if len(str(value)) > 1000 else MANY
        getattr(message, field.name).extend([value] * count)
    except (ValueError, TypeError):
        return False
    return True


def _copy(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
