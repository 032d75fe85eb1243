"""Whatever bytes come: `CoreRequest`s, or a refusal that names its field."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.fuzz import Doors, seeds
from tests.hostile.grpc_cases import bases
from tests.hostile.http_cases import CHAT_FIELDS, COMPLETION_FIELDS, USER

COMPLETIONS, CHAT, OURS, OURS_CHAT, VLLM = range(5)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63), 10**30])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


def fields(names: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), JSON, max_size=5)


@pytest.fixture(scope="module")
def doors(tiny_llama: Path) -> Doors:
    return Doors(tiny_llama)


@given(fields(COMPLETION_FIELDS))
@settings(max_examples=300, deadline=None)
def test_completions(doors: Doors, changed: dict[str, Any]) -> None:
    body = {"prompt": "ab", "max_tokens": 2} | changed
    doors.open(bytes([COMPLETIONS]) + json.dumps(body).encode())


@given(fields((*CHAT_FIELDS, *COMPLETION_FIELDS)))
@settings(max_examples=300, deadline=None)
def test_chat(doors: Doors, changed: dict[str, Any]) -> None:
    body = {"messages": USER, "max_tokens": 2} | changed
    doors.open(bytes([CHAT]) + json.dumps(body).encode())


NAMES = st.sampled_from(["self", "messages", "function", "chat_template", "template", "tools"])
VARIABLES = st.dictionaries(NAMES | st.text(max_size=6), JSON, max_size=3) | JSON


@given(VARIABLES.map(json.dumps) | st.text())
@settings(max_examples=200, deadline=None)
def test_template_variables_over_grpc(doors: Doors, text: str) -> None:
    base: Any = bases()[1][1]
    base.chat_template_kwargs_json = text.encode("utf-8", "replace").decode()
    doors.open(bytes([OURS_CHAT]) + base.SerializeToString())


@given(st.sampled_from(seeds()), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4))))
@settings(max_examples=300, deadline=None)
def test_bytes_that_came_to_harm(
    doors: Doors, valid: bytes, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(valid)
    for at, patch in changes:
        data[at : at + len(patch)] = patch
    doors.open(bytes(data))
