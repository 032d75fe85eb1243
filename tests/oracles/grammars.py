"""Constraints for tests: their grammar's text, whether a completion satisfies them, and what a
hostile client might send.
"""

import json
import re
from functools import lru_cache
from typing import Any

import jsonschema
import msgspec

from jengine.grammar.sources import build_grammar
from jengine.structured_outputs import StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", 'd"e']}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def compact(schema: dict[str, Any]) -> StructuredOutputsParams:
    """JSON without white space, which a random model writes for ever."""
    return StructuredOutputsParams(json=schema, disable_any_whitespace=True)


def grammar_of(params: StructuredOutputsParams) -> str:
    """The text that an engine core takes."""
    return _grammar_of(msgspec.json.encode(params))


@lru_cache
def _grammar_of(encoded: bytes) -> str:
    return build_grammar(msgspec.json.decode(encoded, type=StructuredOutputsParams), set())


def satisfies(params: StructuredOutputsParams, text: str) -> bool:
    match params.kind:
        case "json":
            schema = params.json if isinstance(params.json, dict) else json.loads(params.json or "")
            jsonschema.validate(json.loads(text), schema)
            return True
        case "json_object":
            return isinstance(json.loads(text), dict)
        case "regex":
            return re.fullmatch(params.regex or "", text) is not None
        case "choice":
            return text in (params.choice or ())
        case kind:
            raise ValueError(f"no oracle for {kind}")


def many_schemas(count: int) -> list[dict[str, Any]]:
    """All different, small enough for a random model to end."""
    return [
        {
            "type": "object",
            "properties": {
                f"key{i}": {"type": "string", "pattern": f"^[a-z]{{{1 + i % 4}}}-{i}$"},
                "n": {"type": "integer", "minimum": i, "maximum": 3 * i + 2},
                **({"flag": {"type": "boolean"}} if i % 3 else {}),
                **({"one": {"enum": [None, i, f"v{i}"]}} if i % 2 else {}),
            },
            "required": [f"key{i}", "n"],
            "additionalProperties": False,
        }
        for i in range(count)
    ]


def _deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


# (fields, whether it is refused at the door). The others may run, and end in some way; with a
# larger vocabulary they may be refused, too.
HOSTILE: dict[str, tuple[dict[str, Any], bool]] = {
    "not JSON": ({"json": "{"}, True),
    "no object": ({"json": "[]"}, True),
    "unknown type": ({"json": {"type": "strin"}}, True),
    "unknown keyword": ({"json": {"type": "object", "if": {}, "then": {}}}, True),
    "never": ({"json": {"$ref": "#"}}, True),
    "remote": ({"json": {"$ref": "http://192.0.2.1/schema"}}, True),
    "file": ({"json": {"$ref": "file:///etc/passwd"}}, True),
    "deep schema": ({"json": json.dumps({"allOf": [_deep(200)]})}, True),
    "large schema": (
        {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(20_000)}}},
        True,
    ),
    "exponential schema": (
        {
            "json": {
                "allOf": [
                    {
                        "properties": {
                            "a": {"anyOf": [{"pattern": f".*a.{{{j}}}"} for j in range(8)]}
                        }
                    }
                    for _ in range(8)
                ]
            }
        },
        True,
    ),
    "open bracket": ({"regex": "(a"}, True),
    "look-ahead": ({"regex": "(?=a)b"}, True),
    "back reference": ({"regex": r"(a)\1"}, True),
    "deep expression": ({"regex": "(" * 20_000 + "a" + ")" * 20_000}, True),
    "million times": ({"regex": "a{1000000}"}, False),
    "nested repetition": ({"regex": "((a{1,1000}){1,1000}){1,1000}"}, False),
    "many states": ({"regex": "(.*[a-m].{40}|.*[n-z].{43}|.*[aeiou ].{47})*"}, False),
    "subset explosion": ({"regex": "(a|b)*a(a|b){200}"}, False),
    "undefined rule": ({"grammar": "start: foo"}, True),
    "deep grammar": ({"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000}, True),
    "ambiguous": ({"grammar": 'start: start start | "a" | '}, False),
    "more ambiguous": ({"grammar": 'start: a a a a a a a a\na: a a | "x" | '}, False),
    "huge repetition": ({"grammar": 'start: a{1000000}\na: b{1000000}\nb: "x"{1000000}'}, False),
    "too large": ({"grammar": 'start: "' + "a" * 300_000 + '"'}, True),
    "many choices": ({"choice": [str(i) for i in range(60_000)]}, True),
    "no tags": ({"structural_tag": "{}"}, True),
    "tag without schema": (
        {"structural_tag": '{"structures": [{"begin": "<"}], "triggers": ["<"]}'},
        True,
    ),
}
