"""Commands that share flags: `takes(EngineFlags, ServerFlags)` gives a command the flags of both
dataclasses and hands it one object of each.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, get_type_hints


def takes(*groups: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose first parameters are flag groups: typer sees their fields as its own
    parameters.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[len(groups) :]
        parameters = [p for group in groups for p in _parameters(group)]
        parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]

        @functools.wraps(command)
        def flat(**values: Any) -> None:
            built = [
                group(**{f.name: values.pop(f.name) for f in fields(group)}) for group in groups
            ]
            command(*built, **values)

        flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        flat.__annotations__ = {p.name: p.annotation for p in parameters}
        del flat.__wrapped__  # type: ignore[attr-defined]
        return flat

    return decorate


def _parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=hints[f.name],
        )
        for f in fields(group)
    ]
