"""Which cases of a family run by default."""

from collections.abc import Iterable

import pytest


def by_default(cases: Iterable[str], *names: str) -> list[object]:
    """All cases, of which those without a name here are slow: together they take minutes."""
    every = list(cases)
    assert set(names) <= set(every)
    slow = pytest.mark.slow
    return [case if case in names else pytest.param(case, marks=slow) for case in every]
