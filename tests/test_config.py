"""Defaults that depend on the machine."""

import importlib.util
from pathlib import Path

import pytest

from jengine import config
from jengine.config import EngineConfig, visible_gpus


@pytest.mark.parametrize(
    ("has_driver", "has_plugin", "platforms", "expected"),
    [
        (True, True, "", True),
        (True, True, "cuda,cpu", True),
        (True, True, "cpu", False),
        (True, False, "", False),
        (False, True, "", False),
    ],
)
def test_a_gpu_is_expected_where_driver_and_plugin_are(
    monkeypatch: pytest.MonkeyPatch,
    has_driver: bool,
    has_plugin: bool,
    platforms: str,
    expected: bool,
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(Path, "exists", lambda self: has_driver)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_plugin else None)
    assert config.expects_gpu() == expected


def test_limits_on_a_gpu_are_larger_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "expects_gpu", lambda: True)
    scheduler = EngineConfig.from_kwargs("m", max_num_seqs=32).scheduler
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (32, 8192)
    assert EngineConfig.from_kwargs("m").scheduler.max_num_seqs == 256
    monkeypatch.setattr(config, "expects_gpu", lambda: False)
    assert EngineConfig.from_kwargs("m").scheduler.max_num_batched_tokens == 1024


@pytest.mark.parametrize(
    ("listed", "gpus"), [("2, GPU-b,MIG-c", ("2", "GPU-b", "MIG-c")), ("0", ("0",)), ("", ())]
)
def test_gpus_that_are_listed(
    monkeypatch: pytest.MonkeyPatch, listed: str, gpus: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == gpus
