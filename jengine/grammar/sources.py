"""`StructuredOutputsParams` -> a grammar as llguidance reads it.

Runs in the checking process only: reading GBNF and walking schemas is Python, over text that a
stranger wrote.
"""

import json
from collections.abc import Set
from typing import Any

import llguidance

from jengine.grammar.vocabulary import GrammarError
from jengine.structured_outputs import StructuredOutputsParams


def build_grammar(params: StructuredOutputsParams, special_tokens: Set[str]) -> str:
    """Raises `GrammarError` for what is wrong with the text; the grammar may still be refused when
    it is compiled.
    """
    try:
        match params.kind:
            case "json":
                return _of_schema(_read_schema(params.json), params)
            case "json_object":
                return _of_schema({"type": "object"}, params)
            case "regex":
                return llguidance.LLMatcher.grammar_from_regex(params.regex or "")
            case "choice":
                # Lark reads strings as JSON writes them.
                options = " | ".join(
                    json.dumps(option, ensure_ascii=False) for option in params.choice or ()
                )
                return llguidance.LLMatcher.grammar_from_lark(f"start: {options}")
            case "grammar":
                return llguidance.grammar_from("grammar", params.grammar or "")
            case _:
                return _of_tags(params, special_tokens)
    except RecursionError:
        raise GrammarError("is nested too deeply") from None
    except ValueError as error:
        raise GrammarError(str(error)) from None


def _read_schema(schema: str | dict[str, Any] | None) -> dict[str, Any]:
    value = json.loads(schema) if isinstance(schema, str) else schema
    if not isinstance(value, dict):
        raise GrammarError("must be a JSON object")
    return value


def _of_schema(schema: dict[str, Any], params: StructuredOutputsParams) -> str:
    if params.disable_additional_properties:
        _close_objects(schema)
    options: dict[str, Any] = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=options)  # type: ignore[arg-type]


def _close_objects(schema: Any) -> None:
    """Set `additionalProperties` to false where a schema lists properties and says nothing else."""
    if isinstance(schema, dict):
        if "properties" in schema and "additionalProperties" not in schema:
            schema["additionalProperties"] = False
        for value in schema.values():
            _close_objects(value)
    elif isinstance(schema, list):
        for value in schema:
            _close_objects(value)


def _of_tags(params: StructuredOutputsParams, special_tokens: Set[str]) -> str:
    value = json.loads(params.structural_tag or "")
    if not isinstance(value, dict) or not value.get("structures") or not value.get("triggers"):
        raise GrammarError("must be a JSON object with 'structures' and 'triggers'")
    triggers = value["triggers"]
    tags = []
    for structure in value["structures"]:
        try:
            begin, schema, end = structure["begin"], structure["schema"], structure["end"]
            trigger = next((t for t in triggers if t and begin.startswith(t)), None)
        except (TypeError, KeyError, AttributeError):
            raise GrammarError("each structure needs 'begin', 'schema' and 'end'") from None
        if trigger is None:
            raise GrammarError(f"no trigger begins {begin!r}")
        grammar = json.loads(_of_schema(_read_schema(schema), params))["grammars"][0]["json_schema"]
        tags.append(llguidance.StructTag(trigger=trigger, begin=begin, grammar=grammar, end=end))
    # A trigger in angle brackets is a token of the model, or text that looks like one.
    are_tokens = all(tag.trigger in special_tokens for tag in tags)
    return llguidance.StructTag.to_grammar(tags, assume_special=are_tokens)
