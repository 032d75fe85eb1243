"""`jengine determinism`: what it compares, that it sees what it should, and that a model passes."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jengine import determinism
from jengine.config import EngineConfig
from jengine.determinism import Difference, Probe, compare
from jengine.layers import sampling
from jengine.request import SamplingParams
from jengine.runtime import step
from tests.oracles.dummy_model import write_dummy_model

VOCAB_SIZE = 32768  # over a few hundred tokens log-probabilities are known to differ on CPU


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    write_dummy_model(tmp_path, vocab_size=VOCAB_SIZE)
    return EngineConfig.from_kwargs(
        str(tmp_path), load_format="dummy", skip_tokenizer_init=True, max_num_seqs=16,
        max_num_batched_tokens=128, keep_executables=False, decode_buckets=(1, 4, 16),
        prefill_buckets=(128,),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(determinism, "PROBE_LENGTHS", (5, 40))
    monkeypatch.setattr(determinism, "MAX_TOKENS", 12)
    monkeypatch.setattr(determinism, "COMPANIONS", (1, 7))


def test_a_model_passes_and_requests_were_preempted(config: EngineConfig) -> None:
    lines: list[str] = []
    assert determinism.check(config, lines.append) == []
    conditions = [line for line in lines if line.endswith(": equal")]
    assert len(conditions) == 3 * 5 + 1  # and teacher forcing
    preempted = re.search(r"few pages.*: (\d+) preemptions", lines[-1])
    assert preempted and int(preempted[1]) > 0


def test_a_step_that_sees_its_neighbours_fails(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits with a trace of how many sequences there are: no token changes, bits do."""

    def logprobs(logits_SV: jax.Array, *rest: Any, **options: Any) -> sampling.Logprobs:
        trace = jnp.float32(1e-4 * (logits_SV.shape[0] - 1))
        return sampling.logprobs(logits_SV * (1.0 + trace), *rest, **options)

    monkeypatch.setattr(step, "logprobs", logprobs)
    engines = list(determinism._engines(config))
    monkeypatch.setattr(determinism, "_engines", lambda config: engines[:1])
    differences = determinism.check(config, lambda line: None)
    assert {d.field for d in differences} == {"log-probabilities"}
    assert any("all together" in d.condition for d in differences)
    assert not any(d.condition == "as configured, alone" for d in differences)


def test_the_first_difference_is_named() -> None:
    probe = Probe("greedy prompt of 5", (1, 2), SamplingParams())
    ours = [(7, {7: -0.5}), (8, {8: -0.25}), (9, {9: -1.0})]
    assert list(compare("c", [probe], [ours], [ours])) == []
    token = [ours[0], (3, {8: -0.25}), (4, {})]
    (found,) = compare("c", [probe], [ours], [token])
    assert dataclasses.astuple(found) == ("c", probe.name, 1, "token", 8, 3)
    score = [*ours[:2], (9, {9: -1.0000001})]
    (found,) = compare("c", [probe], [ours], [score])
    assert found == Difference("c", probe.name, 2, "log-probabilities", {9: -1.0}, {9: -1.0000001})
    assert "output token 2: log-probabilities" in str(found)
