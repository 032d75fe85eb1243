"""The plan adds up, is divided fairly between groups, and agrees with what is allocated."""

from pathlib import Path

import jax
import pytest

from jengine.config import CacheConfig
from jengine.kv_spec import KVGroup, KVKind, KVSpec, build_groups
from jengine.runtime.memory import plan_pages
from tests.oracles.core_pump import CorePump
from tests.oracles.dummy_model import write_dummy_model

FULL = KVSpec(KVKind.FULL, (2, 4, 64), "bfloat16", 2)
WINDOW = KVSpec(KVKind.SLIDING_WINDOW, (2, 4, 64), "bfloat16", 2, window=512)


def _plan(groups: tuple[KVGroup, ...], num_bytes: int) -> tuple[int, ...]:
    return plan_pages(
        groups,
        CacheConfig(kv_cache_memory_bytes=num_bytes),
        free_bytes=1 << 40,
        is_cpu=False,
        max_model_len=32768,
        max_chunk=1024,
    )


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
