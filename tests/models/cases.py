"""Which cases of a family run by default."""

from collections.abc import Iterable

import pytest


def by_default(cases: Iterable[str], *names: str) -> list[object]:
    """All cases, of which those without a name here are slow: together they take minutes."""
    assert set(names) <= set(cases := list(cases))
    return [case if case in names else pytest.param(case, marks=pytest.mark.slow) for case in cases]
