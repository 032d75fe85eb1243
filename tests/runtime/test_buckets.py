"""Every plan has a bucket, and the cheapest one is picked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jengine.config import CompileConfig, SchedulerConfig
from jengine.runtime.buckets import (
    Bucket,
    build_buckets,
    essential_buckets,
    pick_bucket,
    powers_of_two,
    preparation_order,
)


def test_default_table() -> None:
    scheduler = SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=1024)
    assert [str(b) for b in build_buckets(CompileConfig(), scheduler)] == [
        "1x1", "2x2", "4x4", "8x8", "16x16", "32x32", "64x64",
        "256x8", "256x64", "1024x8", "1024x64",
    ]  # fmt: skip


def test_powers_of_two_end_with_the_limit() -> None:
    assert powers_of_two(1) == (1,)
    assert powers_of_two(48) == (1, 2, 4, 8, 16, 32, 48)


def test_fine_ladder_has_small_prompts() -> None:
    scheduler = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=4096)
    mixed = [str(b) for b in build_buckets(CompileConfig(), scheduler, growth=2) if not b.is_decode]
    assert mixed == [
        "64x8", "128x8", "256x8", "512x8", "512x256", "1024x8", "1024x256", "2048x8", "2048x256",
        "3072x8", "3072x256", "4096x8", "4096x256",
    ]  # fmt: skip


@given(st.integers(1, 300), st.integers(0, 2000), st.sampled_from((2, 4)), st.data())
def test_every_plan_has_a_bucket(
    max_num_seqs: int, extra: int, growth: int, data: st.DataObject
) -> None:
    budget = max_num_seqs + extra
    scheduler = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    buckets = build_buckets(CompileConfig(), scheduler, growth)
    num_seqs = data.draw(st.integers(1, max_num_seqs))
    num_tokens = data.draw(st.integers(num_seqs, budget))
    picked = pick_bucket(buckets, num_tokens, num_seqs)
    fits = [b for b in buckets if b.num_tokens >= num_tokens and b.num_seqs >= num_seqs]
    if num_tokens > num_seqs:  # decode buckets take one token of each sequence
        fits = [b for b in fits if b.num_tokens > b.num_seqs]
    assert picked == min(fits)
    essential = sorted(essential_buckets(buckets))
    assert picked <= pick_bucket(essential, num_tokens, num_seqs)  # and there is one
    if num_tokens == num_seqs:  # decode: at most twice the work
        assert picked.num_tokens < 2 * num_tokens or num_tokens == 1


def test_buckets_that_miss_a_plan_are_refused() -> None:
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        build_buckets(CompileConfig(prefill_buckets=(32,)), scheduler)
    with pytest.raises(ValueError, match="no bucket"):
        pick_bucket((Bucket(8, 8),), 9, 1)


def test_what_is_prepared_first() -> None:
    scheduler = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=1024)
    buckets = build_buckets(CompileConfig(), scheduler)
    assert [str(b) for b in essential_buckets(buckets)] == ["1024x16", "16x16", "1x1"]
    assert [str(b) for b in preparation_order(buckets)] == [
        "1024x16", "16x16", "1x1",
        "64x8", "64x16", "256x8", "256x16", "1024x8", "2x2", "4x4", "8x8",
    ]  # fmt: skip
    one = build_buckets(CompileConfig(), SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=1))
    assert [str(b) for b in essential_buckets(one)] == ["2x1", "1x1"]
