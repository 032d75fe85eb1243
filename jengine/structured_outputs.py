"""What a completion must look like: vLLM's `StructuredOutputsParams`."""

from typing import Any

import msgspec

from jengine.errors import InvalidRequestError

FIELD = "structured_outputs"  # of `SamplingParams`; what errors call it
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class StructuredOutputsParams(msgspec.Struct, forbid_unknown_fields=True):
    """Exactly one constraint, and options of JSON.

    `json`: a JSON schema, as a dict or as text. `regex`: the whole completion matches it (no
    look-around, no back references). `choice`: it is one of these strings. `grammar`: Lark, or EBNF
    as llama.cpp and xgrammar write it. `json_object`: any JSON object. `structural_tag`: JSON text
    with `structures` (`begin`, `schema`, `end`) and `triggers`: free text, in which what follows a
    trigger has to be one of the structures.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        kinds = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(kinds) != 1:
            raise InvalidRequestError(
                FIELD, f"must set exactly one of {', '.join(KINDS)}; got {', '.join(kinds) or None}"
            )
        if self.choice is not None and not self.choice:
            raise InvalidRequestError(f"{FIELD}.choice", "must not be empty")

    @property
    def kind(self) -> str:
        """The name of the constraint that is set."""
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))
