"""What the comparisons of several families look at."""

from typing import Any

import jax
import numpy as np
import pytest

from jengine.layers import moe


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, np.ndarray]]:
    """(router's number since the start, expert ids) of every call of a router on the device."""
    seen: list[tuple[int, np.ndarray]] = []
    route, traced = moe.route, []

    def recording(logits_TE: jax.Array, top_k: int, *, renormalise: bool) -> Any:
        ids_Tk, weights_Tk = route(logits_TE, top_k, renormalise=renormalise)
        number = len(traced)
        traced.append(number)
        jax.debug.callback(lambda ids: seen.append((number, np.asarray(ids))), ids_Tk)
        return ids_Tk, weights_Tk

    monkeypatch.setattr(moe, "route", recording)
    return seen
