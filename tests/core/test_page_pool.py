from collections import Counter

import pytest

from jengine.core.page_pool import IntegrityError, PagePool


@pytest.fixture
def evicted() -> list[int]:
    return []


@pytest.fixture
def pool(evicted: list[int]) -> PagePool:
    return PagePool(5, evicted.append)  # pages 1 to 4


def test_null_page_is_never_allocated(pool: PagePool) -> None:
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.num_free, pool.num_held, pool.num_usable) == (0, 4, 4)
    with pytest.raises(IntegrityError, match="1 pages wanted, 0 are free"):
        pool.allocate(1)


def test_released_page_is_blank_unless_kept(pool: PagePool) -> None:
    a, b = pool.allocate(2)
    pool.keep(a)
    pool.release(a)
    pool.release(b)
    assert (pool.num_cached, pool.num_free) == (1, 4)
    pool.acquire(a)
    assert (pool.num_cached, pool.num_refs(a)) == (0, 1)
    with pytest.raises(IntegrityError, match="neither held nor cached"):
        pool.acquire(b)


def test_blank_pages_go_before_cached_ones_and_those_least_recently_released_first(
    pool: PagePool, evicted: list[int]
) -> None:
    a, b, c = pool.allocate(3)
    for page in (a, b, c):
        pool.keep(page)
    for page in (b, c, a):
        pool.release(page)
    pool.acquire(c)  # a hit takes it out of the middle
    pool.release(c)  # and makes it the newest: b, a, c
    assert pool.allocate(1) == [4]
    assert evicted == []
    assert pool.allocate(2) == [b, a]
    assert evicted == [b, a]


def test_shared_page_stays_until_the_last_release(pool: PagePool) -> None:
    (page,) = pool.allocate(1)
    pool.acquire(page)
    pool.release(page)
    assert pool.num_held == 1
    pool.release(page)
    assert pool.num_held == 0
    with pytest.raises(IntegrityError, match="released more often"):
        pool.release(page)


def test_dropped_page_becomes_blank_now_or_at_its_release(
    pool: PagePool, evicted: list[int]
) -> None:
    cached, held = pool.allocate(2)
    pool.keep(cached)
    pool.keep(held)
    pool.release(cached)
    pool.drop(cached)
    pool.drop(held)
    pool.release(held)
    assert (pool.num_cached, pool.num_free) == (0, 4)
    pool.allocate(4)
    assert evicted == []


def test_only_held_pages_can_be_kept(pool: PagePool) -> None:
    with pytest.raises(IntegrityError, match="nobody holds it"):
        pool.keep(1)


def test_a_pool_needs_a_page_besides_the_null_page() -> None:
    with pytest.raises(ValueError, match="got 1 pages"):
        PagePool(1, lambda page: None)


def test_integrity_check_compares_with_the_owner(pool: PagePool) -> None:
    a, b = pool.allocate(2)
    pool.keep(a)
    pool.check_integrity(Counter({a: 1, b: 1}), {a})
    with pytest.raises(IntegrityError, match="reference counts"):
        pool.check_integrity(Counter({a: 1, b: 2}), {a})
    with pytest.raises(IntegrityError, match="prefix cache"):
        pool.check_integrity(Counter({a: 1, b: 1}), set())
    pool._blank.append(a)
    with pytest.raises(IntegrityError, match="two places"):
        pool.check_integrity(Counter({a: 1, b: 1}), {a})
    pool._blank[:] = []
    with pytest.raises(IntegrityError, match="lost"):
        pool.check_integrity(Counter({a: 1, b: 1}), {a})
