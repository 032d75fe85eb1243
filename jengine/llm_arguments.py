"""What `LLM`'s methods take in several forms: one or many prompts, conversations, values."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from jengine.errors import InvalidRequestError

T = TypeVar("T")
Message = dict[str, Any]  # {"role": ..., "content": ...}


def as_prompts(prompts: Any) -> Sequence[Any]:
    """A single prompt becomes a list of one; a list of ints is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    prompts = list(prompts)
    is_one = (
        bool(prompts)
        and not isinstance(prompts[0], str | Mapping | Sequence)
        and _is_int(prompts[0])
    )
    return [prompts] if is_one else prompts


def _is_int(value: Any) -> bool:
    """Whether it stands for a token id: Python's ints, and the scalars of numpy arrays."""
    return isinstance(value, int) or getattr(value, "ndim", None) == 0


def as_conversations(messages: Any) -> Sequence[Sequence[Message]]:
    messages = list(messages)
    return [messages] if messages and isinstance(messages[0], Mapping) else messages


def one_each(values: T | Sequence[T], kind: type[T], count: int, name: str) -> Sequence[T]:
    if isinstance(values, kind):
        return [values] * count
    values = list(cast("Sequence[T]", values))
    if len(values) != count:
        raise InvalidRequestError(name, f"there are {count} prompts but {len(values)} values")
    return values
