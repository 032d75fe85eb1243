"""Logits processors of users: pure JAX functions that are compiled into the step. No JAX here: the
front end reads declarations, too.

A processor maps (logits f32[S, V], `LogitsContext`) to logits f32[S, V]. Row s may depend on row s
alone. What a request says to it are named arrays of fixed shapes, declared with the function:

    @logits_processor(strength=Parameter(), ids=Parameter("int32", (8,), default=-1))
    def favour(logits, context):
        is_named = jax.nn.one_hot(context.params["ids"], logits.shape[1]).max(axis=1)
        return logits + context.params["strength"][:, None] * is_named

    LLM(..., logits_processors=[favour])
    SamplingParams(extra_args={"strength": 2.0, "ids": [5, 7]})
"""

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from jengine.errors import InvalidRequestError

ENTRY_POINT_GROUP = "jengine.logits_processors"
FIELD = "extra_args"
MAX_WORDS = 1024  # of all processors' parameters: they travel with every sequence of every step

Array: TypeAlias = Any  # of JAX
Source: TypeAlias = (
    str | Callable[..., Any]
)  # "module:function", an entry point's name, or the function
_DECLARATION = "__jengine_parameters__"


class Parameter(msgspec.Struct, frozen=True):
    """An array that comes with a request: `dtype[shape]`, filled with `default` where the request
    names others of the same processor only. None: it must be given.
    """

    dtype: Literal["float32", "int32", "bool"] = "float32"
    shape: tuple[int, ...] = ()
    default: float | int | bool | None = None

    @property
    def num_words(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class ProcessorInfo(msgspec.Struct, frozen=True):
    """What requests may say to one processor. Without parameters it acts on every request."""

    name: str
    parameters: dict[str, Parameter]

    @property
    def num_words(self) -> int:
        """The first says whether it acts on the request."""
        return 1 + sum(parameter.num_words for parameter in self.parameters.values())


@dataclasses.dataclass(frozen=True)
class LogitsContext:
    """What a processor is told of the S sequences that sample."""

    params: Mapping[str, Array]  # [S, *shape] of each declared parameter
    is_active: Array  # bool[S]; what it makes of other rows is dropped
    positions: Array  # i32[S]; index of the token being chosen, in prompt and completion
    output_counts: Array  # i32[S, V]; how often a token is in the completion so far
    prompt_mask: Array  # bool[S, V]; tokens of the prompt


@dataclasses.dataclass(frozen=True)
class LogitsProcessor:
    """A function and what it declares."""

    info: ProcessorInfo
    function: Callable[[Array, LogitsContext], Array]


def logits_processor(**parameters: Parameter) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares what requests may say to the function."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, _DECLARATION, parameters)
        return function

    return declare


def load_processors(sources: Iterable[Source]) -> tuple[LogitsProcessor, ...]:
    """In the order in which they are applied. Raises `ValueError` for what cannot be used."""
    processors: list[LogitsProcessor] = []
    owners: dict[str, str] = {}
    for source in sources:
        function: Any = _import(source) if isinstance(source, str) else source
        name = source if isinstance(source, str) else getattr(source, "__name__", repr(source))
        if isinstance(function, type) or not callable(function):
            raise ValueError(
                f"logits_processors: {name} is not a function (vLLM's classes cannot be compiled)"
            )
        parameters: dict[str, Parameter] = dict(getattr(function, _DECLARATION, {}))
        for parameter in parameters:
            if parameter in owners:
                raise ValueError(
                    f"logits_processors: {name} and {owners[parameter]} both declare {parameter!r}"
                )
            owners[parameter] = name
        processors.append(LogitsProcessor(ProcessorInfo(name, parameters), function))
    if (num_words := count_words([p.info for p in processors])) > MAX_WORDS:
        raise ValueError(
            f"logits_processors: parameters have {num_words} values, at most {MAX_WORDS}"
        )
    return tuple(processors)


def count_words(infos: Iterable[ProcessorInfo]) -> int:
    return sum(info.num_words for info in infos)


def encode_arguments(
    infos: Sequence[ProcessorInfo], extra_args: Mapping[str, Any] | None
) -> np.ndarray:
    """i32[E]: what a request says to all processors. Raises `InvalidRequestError`."""
    given = dict(extra_args or {})
    words: list[np.ndarray] = []
    for info in infos:
        mine = {name: given.pop(name) for name in info.parameters if name in given}
        is_active = bool(mine) or not info.parameters
        words.append(np.array([is_active], np.int32))
        words += [
            _words(name, parameter, mine.get(name), is_active)
            for name, parameter in info.parameters.items()
        ]
    if given:
        known = sorted(name for info in infos for name in info.parameters)
        raise InvalidRequestError(
            FIELD,
            f"no logits processor of this engine takes {', '.join(map(repr, sorted(given)))} "
            f"(known: {', '.join(known) or 'none'})",
        )
    return np.concatenate(words) if words else np.zeros(0, np.int32)


def _words(name: str, parameter: Parameter, value: Any, is_active: bool) -> np.ndarray:
    if not is_active:
        return np.zeros(parameter.num_words, np.int32)
    if value is None and (value := parameter.default) is None:
        raise InvalidRequestError(f"{FIELD}.{name}", "must be given: it has no default")
    elif value is parameter.default:
        value = np.full(parameter.shape, value)
    try:
        array = np.asarray(value)
    except ValueError:
        raise InvalidRequestError(f"{FIELD}.{name}", "must be a number or even lists") from None
    kinds = {"float32": "fiu", "int32": "iu", "bool": "b"}[parameter.dtype]
    if array.shape != parameter.shape or array.dtype.kind not in kinds:
        wanted = f"{parameter.dtype}{list(parameter.shape)}"
        raise InvalidRequestError(
            f"{FIELD}.{name}", f"must be {wanted}, got {array.dtype}{list(array.shape)}"
        )
    if parameter.dtype == "int32" and array.size:
        limits = np.iinfo(np.int32)
        if array.min() < limits.min or array.max() > limits.max:
            raise InvalidRequestError(f"{FIELD}.{name}", "must fit in 32 bits")
    dtype = np.float32 if parameter.dtype == "float32" else np.int32
    return array.astype(dtype).reshape(-1).view(np.int32)


def _import(source: str) -> Any:
    module, colon, name = source.partition(":")
    if colon:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"logits_processors: {source}: {error}") from None
    entries = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=source)
    if not entries:
        raise ValueError(
            f"logits_processors: {source!r} is neither 'module:function' nor the name of an "
            f"entry point in {ENTRY_POINT_GROUP}"
        )
    return next(iter(entries)).load()
