"""`response_format` of the OpenAI API, and vLLM's `structured_outputs` beside it."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from jengine.errors import InvalidRequestError
from jengine.structured_outputs import FIELD, StructuredOutputsParams

RESPONSE_FORMAT = "response_format"


def read_constraint(
    response_format: dict[str, Any] | None, structured_outputs: dict[str, Any] | None
) -> StructuredOutputsParams | None:
    """What both ask for together: options of the second hold for the first."""
    try:
        kinds = _read_format(response_format or {})
        fields = {**(structured_outputs or {}), **kinds}
        return msgspec.convert(fields, StructuredOutputsParams) if fields else None
    except RecursionError:
        name = RESPONSE_FORMAT if response_format else FIELD
        raise InvalidRequestError(name, "is nested too deeply") from None
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, InvalidRequestError):
            raise error.__cause__ from None
        message, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`").partition(".")[0].partition("[")[0]
        raise InvalidRequestError(f"{FIELD}.{name}" if name else FIELD, message) from None


def constraint_field(response_format: dict[str, Any] | None) -> str:
    """What errors call the constraint, if not as we do."""
    return RESPONSE_FORMAT if _read_format(response_format or {}) else ""


def _read_format(response_format: dict[str, Any]) -> dict[str, Any]:
    """Fields of `StructuredOutputsParams`."""
    match response_format.get("type", "text"):
        case "text":
            return {}
        case "json_object":
            return {"json_object": True}
        case "json_schema":
            wrapper = response_format.get("json_schema")
            schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
            if not isinstance(schema, dict):
                raise InvalidRequestError(
                    RESPONSE_FORMAT, "json_schema.schema must hold a JSON schema"
                )
            return {"json": schema}
        case "structural_tag":
            return {"structural_tag": json.dumps(response_format)}
        case other:
            raise InvalidRequestError(
                RESPONSE_FORMAT,
                f"type must be text, json_object, json_schema or structural_tag, got {other!r}",
            )
