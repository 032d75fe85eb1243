"""Where batch invariance can be promised, and what is said where it cannot."""

import dataclasses
from typing import Any

import pytest

from jengine.models.cohere import CohereForCausalLM
from jengine.pallas_kernels.platform import tracing_for
from jengine.runtime.batch_invariance import resolve_batch_invariant
from tests.oracles.h100 import LLAMA_8B, read_config


def llama(**changes: Any) -> tuple[Any, Any]:
    model, cfg = read_config(LLAMA_8B)
    return model, dataclasses.replace(cfg, **changes)


def test_on_a_cpu_nothing_has_to_be_done() -> None:
    for wanted in (None, True, False):
        assert not resolve_batch_invariant(wanted, *llama())


def test_default_and_wish_on_hopper() -> None:
    with tracing_for("cuda"):
        assert resolve_batch_invariant(None, *llama())
        assert resolve_batch_invariant(True, *llama(), 2)
        assert not resolve_batch_invariant(False, *llama())


@pytest.mark.parametrize(
    ("model", "options", "missing"),
    [
        (llama(dtype="float32"), {}, "a model in float32"),
        (llama(), {"num_ranks": 4}, "sums over 4 devices"),
        (llama(), {"experts_move": True}, "experts that move"),
        ((CohereForCausalLM, llama()[1]), {}, "layer normalisation"),
    ],
)
def test_what_is_missing(model: Any, options: dict[str, Any], missing: str) -> None:
    with tracing_for("cuda"):
        assert not resolve_batch_invariant(None, *model, **options)
        with pytest.raises(ValueError, match=f"batch_invariant: cannot be promised for {missing}"):
            resolve_batch_invariant(True, *model, **options)
