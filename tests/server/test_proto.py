"""Our proto file: commented throughout, compiled stubs up to date, runtimes that fit together."""

import itertools
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from jengine.request import SamplingParams
from jengine.server.proto import engine_pb2

REPO = Path(__file__).resolve().parents[2]
PROTO = REPO / "server" / "proto" / "engine.proto"
SOURCE = "jengine/server/proto/engine.proto"  # through the symlink: it is part of the stubs
GENERATED = ("engine_pb2.py", "engine_pb2.pyi", "engine_pb2_grpc.py")

# A declaration that people read: message, enum, service, rpc, oneof, field or enum value.
DECLARATION = re.compile(
    r"^\s*(message \w+|enum \w+|service \w+|rpc \w+|oneof \w+"
    r"|(?:(?:optional|repeated) )?[\w.<>, ]+ \w+ = \d+;|[A-Z_]+ = \d+;)"
)


def test_every_declaration_has_a_comment_above_it() -> None:
    lines = PROTO.read_text().splitlines()
    bare = [
        line.strip()
        for above, line in itertools.pairwise(lines)
        if DECLARATION.match(line)
        and not line.startswith(("syntax", "package"))
        and not above.strip().startswith("//")
    ]
    assert bare == []


def test_the_pattern_sees_declarations() -> None:
    found = [line for line in PROTO.read_text().splitlines() if DECLARATION.match(line)]
    # One count from the compiled file, independent of the pattern.
    messages = list(engine_pb2.DESCRIPTOR.message_types_by_name.values())
    enums = [enum for message in messages for enum in message.enum_types]
    expected = sum(1 + len(m.fields) for m in messages)
    expected += sum(1 + len(enum.values) for enum in enums)
    expected += sum(len([o for o in m.oneofs if not o.name.startswith("_")]) for m in messages)
    service = engine_pb2.DESCRIPTOR.services_by_name["Inference"]
    expected += 1 + len(service.methods)
    assert len(found) == expected


def test_regenerating_gives_the_committed_stubs(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    grpc_stub = (REPO / "server" / "proto" / "engine_pb2_grpc.py").read_text()
    match = re.search(r"GRPC_GENERATED_VERSION = '([^']+)'", grpc_stub)
    assert match is not None
    if metadata.version("grpcio-tools") != match[1]:
        pytest.skip(f"stubs were made with grpcio-tools {match[1]}")
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *out, SOURCE],
        cwd=REPO,
        check=True,
    )
    for name in GENERATED:
        fresh = (tmp_path / "jengine" / "server" / "proto" / name).read_text()
        assert fresh == (REPO / "server" / "proto" / name).read_text(), name


def test_protobuf_satisfies_our_stubs_and_the_gateway_package() -> None:
    text = (REPO / "server" / "proto" / "engine_pb2.py").read_text()
    match = re.search(r"Protobuf Python Version: ([\d.]+)", text)
    assert match is not None
    installed = metadata.version("protobuf")
    assert tuple(map(int, installed.split("."))) >= tuple(map(int, match[1].split(".")))
    needed = [Requirement(line) for line in metadata.requires("smg-grpc-proto") or ()]
    (protobuf,) = [req for req in needed if req.name == "protobuf" and req.marker is None]
    assert protobuf.specifier.contains(installed)


def test_sampling_fields_are_those_of_sampling_params() -> None:
    """A new field of SamplingParams must be offered or left out on purpose."""
    left_out = {"detokenize", "output_kind", "bad_word_ids", "skip_reading_prefix_cache"}
    left_out |= {"thinking_markers"}  # the front end's
    ours = set(engine_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    ours = {name.removesuffix("_json") for name in ours}
    assert ours == set(SamplingParams.__struct_fields__) - left_out


def test_scalar_sampling_fields_know_whether_they_are_set() -> None:
    for field in engine_pb2.SamplingParams.DESCRIPTOR.fields:
        if not field.is_repeated:
            assert field.has_presence, field.name
