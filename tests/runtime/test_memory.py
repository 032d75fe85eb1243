"""The plan adds up, is divided fairly between groups, and agrees with what is allocated."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jengine.config import CacheConfig, device_memory_share, set_device_memory_share
from jengine.kv_spec import KVGroup, KVKind, KVSpec, build_groups
from jengine.layers.param import ParamInfo
from jengine.runtime import memory
from jengine.runtime.blueprint import largest_tuned_bytes
from jengine.runtime.buckets import Bucket
from jengine.runtime.memory import (
    DeviceMemory,
    ExecutableMemory,
    MemoryPlan,
    device_memory,
    plan_pages,
)
from tests.oracles.core_pump import CorePump
from tests.oracles.dummy_model import write_dummy_model

FULL = KVSpec(KVKind.FULL, (2, 4, 64), "bfloat16", 2)
WINDOW = KVSpec(KVKind.SLIDING_WINDOW, (2, 4, 64), "bfloat16", 2, window=512)
LATENT = KVSpec(KVKind.MLA, (512 + 64,), "bfloat16", 2)  # DeepSeek's
# Qwen3-Next's: matrices of 32 heads, and three inputs of its convolution.
STATE = KVSpec(KVKind.STATE, (32 * 128 * 128 + 3 * 8192,), "float32", 4)
GATED = KVSpec(KVKind.FULL, (2, 2, 256), "bfloat16", 2)
NEXT = ([STATE] * 3 + [GATED]) * 12


MIB = 1 << 20
GB = 10**9
SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def _plan(groups: tuple[KVGroup, ...], num_bytes: int, max_num_seqs: int = 256) -> tuple[int, ...]:
    return plan_pages(
        groups,
        CacheConfig(kv_cache_memory_bytes=num_bytes),
        free_bytes=1 << 40,
        is_planned=True,
        max_model_len=32768,
        max_chunk=1024,
        max_num_seqs=max_num_seqs,
    )


def test_latents_take_one_entry_a_token() -> None:
    """DeepSeek-V2-Lite's 27 layers; its 16 heads of 192 and 128 would take nine times as much."""
    (pages,) = _plan(build_groups([LATENT] * 27, 16), 1 << 30)
    assert pages == (1 << 30) // (16 * 27 * 576 * 2)


def test_groups_share_the_bytes_by_what_a_long_request_holds() -> None:
    """Five window layers to one full: 32k tokens need few window pages, so the cache holds over
    four times the tokens of an all-full one of the same size.
    """
    groups = build_groups([WINDOW] * 5 + [FULL], 16)
    window_pages, full_pages = _plan(groups, 1 << 30)
    all_full = build_groups([FULL] * 6, 16)
    (same_bytes,) = _plan(all_full, 1 << 30)
    assert full_pages > 4 * same_bytes
    window_requests = (window_pages - 1) / groups[0].max_pages(32768, 1024)
    full_requests = (full_pages - 1) / groups[1].max_pages(32768, 1024)
    assert window_requests == pytest.approx(full_requests, rel=0.02)
    total = window_pages * groups[0].bytes_per_page + full_pages * groups[1].bytes_per_page
    assert (1 << 30) * 0.99 < total <= 1 << 30


def test_states_come_for_each_request_that_may_run() -> None:
    """Two that it holds and two that may be found again; the rest is for tokens."""
    groups = build_groups(NEXT, 16)
    assert [group.spec.kind for group in groups] == [KVKind.FULL, KVKind.STATE]
    num_pages, num_states = _plan(groups, 40 << 30, max_num_seqs=32)
    assert num_states == 4 * 32 + 1
    total = num_pages * groups[0].bytes_per_page + num_states * groups[1].bytes_per_page
    assert (40 << 30) * 0.99 < total <= 40 << 30


def test_states_take_half_of_the_bytes_at_most() -> None:
    groups = build_groups(NEXT, 16)
    num_pages, num_states = _plan(groups, 16 << 30)
    assert (8 << 30) * 0.98 < num_states * groups[1].bytes_per_page <= 8 << 30
    assert num_pages * groups[0].bytes_per_page > (8 << 30) * 0.98
    least = _plan(groups, (1 << 30) + (16 << 20))  # one request of 32k tokens, and the null pages
    assert least[1] >= 3
    assert least[0] >= 1 + 2048
    with pytest.raises(ValueError, match="one request"):
        _plan(groups, 1 << 29)


def test_a_model_of_states_alone_has_a_plan() -> None:
    assert _plan(build_groups([STATE] * 4, 16), 1 << 30, max_num_seqs=8) == (33,)


@pytest.mark.parametrize(("num_pages", "states"), [(30, 17), (10, 10), (2, 3)])
def test_states_beside_a_given_number_of_pages(num_pages: int, states: int) -> None:
    plan = plan_pages(
        build_groups(NEXT, 16), CacheConfig(num_pages=num_pages), free_bytes=0, is_planned=False,
        max_model_len=64, max_chunk=32, max_num_seqs=4,
    )  # fmt: skip
    assert plan == (num_pages, states)


def test_a_cache_too_small_for_one_request_is_refused() -> None:
    groups = build_groups([FULL], 16)
    with pytest.raises(ValueError, match="max_model_len=32768 needs 33,570,816"):
        _plan(groups, 1 << 24)


def test_plan_matches_what_is_allocated(tmp_path: Path) -> None:
    pump = CorePump(write_dummy_model(tmp_path), num_pages=30)
    runner = pump.core.runner
    plan = runner.memory_plan()
    assert plan.kv_cache == sum(x.nbytes for x in runner.kv)
    assert plan.kv_cache == 30 * runner.groups[0].bytes_per_page
    assert plan.parameters == sum(x.nbytes for x in runner.params.values())
    live = sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())
    assert plan.parameters + plan.kv_cache + plan.row_state <= live
    assert plan.workspace >= max(b.num_seqs for b in runner.buckets) * runner.vocab_size * 4
    assert "KV cache (232 tokens)" in plan.table()


# --- what a GPU has for us. Its memory is 80 GB here.


def _gpu(share: float, in_use: int = 0) -> Any:
    stats = {"bytes_limit": int(80 * GB * share), "bytes_in_use": in_use}
    return SimpleNamespace(platform="gpu", memory_stats=lambda: stats)


@pytest.fixture
def no_share(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in SHARES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_our_pool_leaves_cuda_its_part_of_the_budget(no_share: pytest.MonkeyPatch) -> None:
    no_share.setenv(SHARES[0], "0.9100")
    ours = device_memory(_gpu(0.91), CacheConfig(gpu_memory_utilization=0.92))
    assert ours.budget == pytest.approx(0.92 * 80 * GB, abs=4)
    assert ours.pool == pytest.approx(0.91 * 80 * GB, abs=4)
    assert ours.outside == pytest.approx(0.8 * GB, abs=4)
    assert ours.is_planned


def test_a_pool_that_the_user_sized_bounds_the_plan(no_share: pytest.MonkeyPatch) -> None:
    cache = CacheConfig(gpu_memory_utilization=0.92)
    assert device_memory(_gpu(0.75), cache).pool == pytest.approx(60 * GB, abs=4)  # XLA's default
    no_share.setenv(SHARES[1], "0.95")
    half = device_memory(_gpu(0.95), CacheConfig(gpu_memory_utilization=0.5))
    assert half.pool == pytest.approx(0.49 * 80 * GB, abs=4)
    assert half.budget == pytest.approx(40 * GB, abs=4)


def test_what_others_hold_is_not_ours(no_share: pytest.MonkeyPatch) -> None:
    no_share.setenv(SHARES[0], "0.91")
    cache = CacheConfig(gpu_memory_utilization=0.92)
    free, taken = (device_memory(_gpu(0.91, in_use), cache) for in_use in (0, 300 * MIB))
    assert free.pool - taken.pool == 320 * MIB  # in steps, so that pages stay the same
    assert free.budget - taken.budget == 320 * MIB


def test_another_allocator_is_not_planned_with(no_share: pytest.MonkeyPatch) -> None:
    device: Any = SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    assert device_memory(device, CacheConfig()) == DeviceMemory(0, 0, is_planned=True)


def test_the_share_is_set_unless_the_user_did(no_share: pytest.MonkeyPatch) -> None:
    no_share.setenv(SHARES[0], "")  # counts as not set, and is put back after the test
    assert device_memory_share() == 0.75
    set_device_memory_share(0.91)
    assert device_memory_share() == 0.91
    set_device_memory_share(0.5)
    assert device_memory_share() == 0.91
    no_share.delenv(SHARES[0])
    no_share.setenv(SHARES[1], "0.3")
    set_device_memory_share(0.5)
    assert device_memory_share() == 0.3


def test_the_pool_is_sized_before_the_back_end_starts() -> None:
    """In a fresh interpreter; here the back end runs, and it is too late."""
    code = (
        "import os, jax\n"
        "from jengine.config import CacheConfig\n"
        "from jengine.runtime.memory import open_devices\n"
        "open_devices(CacheConfig(gpu_memory_utilization=0.6))\n"
        "print(os.environ['XLA_CLIENT_MEM_FRACTION'])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "0.5900", run.stderr
    before = device_memory_share()
    memory.open_devices(CacheConfig(gpu_memory_utilization=0.6))
    assert device_memory_share() == before


def test_pages_do_not_follow_every_megabyte() -> None:
    """Two cards of one kind, tens of megabytes apart, share their executables."""

    def pages(free_bytes: int) -> tuple[int, ...]:
        return plan_pages(
            build_groups([FULL], 16),
            CacheConfig(),
            free_bytes=free_bytes,
            is_planned=True,
            max_model_len=32768,
            max_chunk=1024,
            max_num_seqs=256,
        )

    base = 800 * 64 * MIB
    assert pages(base + 5 * MIB) == pages(base + 60 * MIB) == pages(base)
    assert pages(base)[0] * 16 * 2 * 4 * 64 * 2 <= base
    assert pages(base - 1) < pages(base)
    assert pages(1000 * MIB + 50 * MIB) > pages(1000 * MIB)  # little memory is not rounded


def test_the_table_adds_up() -> None:
    programs = {
        "8192x256": ExecutableMemory(800 * MIB, 100 * MIB, 8 * MIB, aliased=999, code=5),
        "1x1": ExecutableMemory(900 * MIB, 1 * MIB, 0, aliased=999, code=5),
    }
    device = DeviceMemory(budget=80_000 * MIB, pool=79_000 * MIB, is_planned=True)
    plan = MemoryPlan(
        16_000 * MIB, 55_000 * MIB, 300 * MIB, programs, (100, 9),
        build_groups([STATE, FULL], 16), device, 1500 * MIB,
    )  # fmt: skip
    assert plan.workspace == (800 + 2 * 108) * MIB  # two steps' inputs and outputs
    assert plan.peak == (16_000 + 55_000 + 300 + 1016) * MIB
    assert plan.total == plan.peak + (1500 + 1000) * MIB
    lines = {line[:-16].strip(): line.split()[-2] for line in plan.table().splitlines()}
    assert lines["peak"] == "72,316.0"
    assert lines["KV cache (1,584 tokens, 8 states)"] == "55,000.0"
    assert lines["reserve (tuning, figures that differ)"] == "1,500.0"
    assert lines["outside the pool (CUDA)"] == "1,000.0"
    assert lines["total"] == "74,816.0"
    assert lines["budget"] == "80,000.0"


def test_the_largest_parameter_tuned_while_serving() -> None:
    parameters = [
        ParamInfo((1000, 8), "bfloat16", ("vocab", "embed")),
        ParamInfo((4, 500, 8), "bfloat16", ("experts", "mlp", "embed")),
        ParamInfo((50, 8), "bfloat16", ("mlp", "embed")),
    ]
    few = [Bucket(1, 1), Bucket(64, 64), Bucket(256, 256), Bucket(512, 256)]
    assert largest_tuned_bytes(parameters, few, has_own_head=True) == 2 * 50 * 8
    assert largest_tuned_bytes(parameters, few, has_own_head=False) == 2 * 1000 * 8
    # 256 rows are too many for our kernel, and no essential bucket has as many.
    many = [*few, Bucket(512, 512), Bucket(1024, 512)]
    assert largest_tuned_bytes(parameters, many, has_own_head=True) == 2 * 1000 * 8
