"""Expectations are worked out by hand; pages are handed out in the order 1, 2, 3, ..."""

import sys

import pytest

from jengine.core.kv_manager import KVManager, PageTables
from jengine.core.page_pool import IntegrityError
from jengine.kv_spec import KVKind, KVSpec, build_groups
from jengine.request import Request
from tests.core.factories import make_kv, make_request

CHUNK = 64


def admit(kv: KVManager, request: Request) -> int:
    """Match and admit; returns the tokens found in the prefix cache."""
    hit = kv.match_prefix(request)
    assert kv.admit(request, hit, CHUNK)
    request.num_computed_tokens = hit.num_tokens
    return hit.num_tokens


def compute(kv: KVManager, request: Request, num_tokens: int) -> PageTables:
    tables = kv.allocate(request, num_tokens)
    assert tables is not None
    request.num_computed_tokens += num_tokens
    return tables


def run_prompt(kv: KVManager, request: Request) -> PageTables:
    return compute(kv, request, request.num_tokens - admit(kv, request))


def test_tables_grow_by_whole_pages() -> None:
    kv = make_kv(page_size=4)
    request = make_request("a", range(9))
    admit(kv, request)
    table = compute(kv, request, 4)[0]
    assert table == [1]
    compute(kv, request, 1)
    assert table == [1, 2]  # the same live list
    compute(kv, request, 4)
    assert table == [1, 2, 3]
    assert (kv.num_pages_used, kv.num_pages_total) == (3, 16)
    kv.free(request)
    assert kv.num_pages_used == 0
    kv.check_integrity(set())


def test_equal_prompt_shares_full_pages_but_computes_its_last_token() -> None:
    kv = make_kv(page_size=4)
    first, second = make_request("a", range(8)), make_request("b", range(8))
    assert run_prompt(kv, first)[0] == [1, 2]
    # Page 2 is full and cached, but the last token must be computed: only page 1 is shared.
    assert admit(kv, second) == 4
    assert compute(kv, second, 4)[0] == [1, 3]
    kv.check_integrity({"a", "b"})
    third = make_request("c", range(9))
    assert run_prompt(kv, third)[0] == [1, 2, 4]


def test_freed_pages_are_found_again() -> None:
    kv = make_kv(page_size=4)
    first = make_request("a", range(10))
    run_prompt(kv, first)
    kv.free(first)
    assert run_prompt(kv, make_request("b", [*range(8), 99]))[0][:2] == [1, 2]


def test_salt_and_fingerprint_and_opting_out_keep_requests_apart() -> None:
    kv = make_kv(page_size=2)
    run_prompt(kv, make_request("a", range(6), cache_salt="x"))
    assert admit(kv, make_request("b", range(6))) == 0
    assert admit(kv, make_request("c", range(6), cache_salt="x")) == 4
    assert admit(kv, make_request("d", range(6), cache_salt="x", prompt_logprobs=1)) == 0
    off = make_kv(page_size=2, caching=False)
    run_prompt(off, make_request("a", range(6)))
    assert admit(off, make_request("b", range(6))) == 0


def test_page_is_registered_once_the_host_knows_its_last_token() -> None:
    kv = make_kv(page_size=2)
    request = make_request("a", [7, 8, 9])
    run_prompt(kv, request)
    request.num_pending_tokens = 1
    compute(kv, request, 1)  # writes the pending token 5: page 1 is full on the device
    probe = make_request("b", [7, 8, 9, 5, 0])
    assert kv.match_prefix(probe).num_tokens == 2
    request.token_ids.append(5)
    compute(kv, request, 1)
    assert kv.match_prefix(probe).num_tokens == 4


def test_pages_are_registered_when_their_step_is_planned() -> None:
    kv = make_kv(page_size=2)
    request = make_request("a", range(7))
    admit(kv, request)
    compute(kv, request, 3)
    probe = make_request("b", range(7))
    assert kv.match_prefix(probe).num_tokens == 2  # the second page is only half written
    compute(kv, request, 1)
    assert kv.match_prefix(probe).num_tokens == 4


def test_tail_is_evicted_before_head() -> None:
    kv = make_kv(page_size=2, num_pages=5)  # 4 pages
    request = make_request("a", range(8))
    run_prompt(kv, request)
    kv.free(request)
    probe = make_request("b", range(9))
    assert kv.match_prefix(probe).num_tokens == 8
    run_prompt(kv, make_request("c", [50]))
    assert kv.match_prefix(probe).num_tokens == 6
    run_prompt(kv, make_request("d", [51]))
    assert kv.match_prefix(probe).num_tokens == 4


def test_idle_copy_gives_way_to_a_held_one() -> None:
    kv = make_kv(page_size=2)
    first = make_request("a", [1, 2, 3, 4])
    run_prompt(kv, first)  # pages 1 and 2
    kv.free(first)
    second = make_request("b", [1, 2, 3, 4])
    assert run_prompt(kv, second)[0] == [1, 3]  # page 3 is a copy of page 2
    assert kv.match_prefix(make_request("c", [1, 2, 3, 4, 5])).pages == ([1, 3],)
    third = make_request("d", [1, 2, 3, 4])
    run_prompt(kv, third)  # another copy, but page 3 is held
    assert kv.match_prefix(make_request("e", [1, 2, 3, 4, 5])).pages == ([1, 3],)
    kv.check_integrity({"b", "d"})


def test_admission_needs_room_for_the_whole_prompt() -> None:
    kv = make_kv(page_size=2, num_pages=6)  # 5 pages
    run_prompt(kv, make_request("a", range(4)))  # takes 2
    too_long = make_request("b", range(50, 57))  # needs 4
    assert not kv.admit(too_long, kv.match_prefix(too_long), CHUNK)
    kv.check_integrity({"a"})
    fits = make_request("c", range(50, 56))  # needs 3
    assert kv.admit(fits, kv.match_prefix(fits), CHUNK)


def test_pages_of_the_hit_are_not_counted_as_free_too() -> None:
    kv = make_kv(page_size=2, num_pages=5)  # 4 pages
    first = make_request("a", range(4))
    run_prompt(kv, first)
    kv.free(first)  # 2 cached, 2 blank
    request = make_request("b", range(9))  # 5 pages: 2 from the cache, 3 new
    hit = kv.match_prefix(request)
    assert hit.num_tokens == 4
    assert not kv.admit(request, hit, CHUNK)
    request = make_request("c", range(8))  # 4 pages
    assert kv.admit(request, kv.match_prefix(request), CHUNK)


def test_allocation_takes_pages_in_all_groups_or_in_none() -> None:
    specs = [
        KVSpec(KVKind.FULL, (2, 1, 1), "float32", 4),
        KVSpec(KVKind.SLIDING_WINDOW, (2, 1, 1), "float32", 4, 100),
    ]
    kv = KVManager(build_groups(specs, 2), [9, 4], enable_prefix_caching=True)
    request = make_request("a", range(6))
    run_prompt(kv, request)
    request.token_ids += [6, 7]
    assert kv.allocate(request, 1) is None  # the second group's 3 pages are in use
    assert kv.num_pages_used == 6
    kv.check_integrity({"a"})


def test_pages_that_fell_out_of_the_window_are_released() -> None:
    kv = make_kv((None, 4), page_size=2)
    request = make_request("a", range(20))
    admit(kv, request)
    full, window = compute(kv, request, 6)
    assert window == [1, 2, 3]
    compute(kv, request, 1)  # position 6 reads 3 to 6: page 0 (tokens 0, 1) is out
    assert window == [0, 2, 3, 4]
    compute(kv, request, 1)  # position 7 reads 4 to 7: page 1 is out
    assert window == [0, 0, 3, 4]
    compute(kv, request, 6)
    # While tokens 8 to 13 are computed, position 8 still reads 5 to 8.
    assert window[:3] == [0, 0, 3]
    assert 0 not in full
    kv.check_integrity({"a"})
    kv.free(request)
    assert kv.num_pages_used == 0


def test_window_hit_needs_only_the_pages_that_queries_read() -> None:
    kv = make_kv((4,), page_size=2)
    request = make_request("a", range(12))
    run_prompt(kv, request)
    compute_one = make_request("b", range(13))
    hit = kv.match_prefix(compute_one)
    # Position 12 reads 9 to 12: pages 4 (tokens 8, 9) and 5. Those before are null.
    assert hit.num_tokens == 12
    assert hit.pages == ([0, 0, 0, 0, 5, 6],)
    assert run_prompt(kv, compute_one)[0] == [0, 0, 0, 0, 5, 6, 7]
    kv.check_integrity({"a", "b"})


def test_hit_is_the_longest_that_all_groups_can_serve() -> None:
    kv = make_kv((None, 4), page_size=2)
    request = make_request("a", range(12))
    run_prompt(kv, request)
    kv.free(request)
    full, window = kv._groups
    probe = make_request("b", range(13))
    window.forget(kv._chains.get("b", kv._extend_chain(probe, 6))[5])  # page 4: tokens 8, 9
    # Boundaries 12 (reads 9 ..) and 10 (reads 7 ..) need it, 8 (reads 5 ..) does not.
    assert kv.match_prefix(probe).num_tokens == 8
    full.forget(kv._chains["b"][2])  # page 1: tokens 2, 3
    assert kv.match_prefix(probe).num_tokens == 2


def test_shortening_by_one_group_is_checked_again_by_the_others() -> None:
    kv = make_kv((4, None), page_size=2)  # the window group is asked first
    request = make_request("a", range(12))
    run_prompt(kv, request)
    window, full = kv._groups
    probe = make_request("b", range(13))
    chain = kv._extend_chain(probe, 6)
    window.forget(chain[3])  # page 2: tokens 4, 5, which boundary 8 (reads 5 ..) needs
    full.forget(chain[5])  # page 4: no boundary beyond 8
    # The window serves 12, full attention then only 8, which the window cannot serve; nor can it
    # serve 6 (reads 3 ..). Boundary 4 reads tokens 1 to 3.
    assert kv.match_prefix(probe).num_tokens == 4


def test_hit_is_admitted_into_a_pool_that_only_just_holds_the_window() -> None:
    kv = make_kv((4,), page_size=2, num_pages=5)
    chunk = 2  # at most ceil((3 + 2) / 2) + 1 = 4 live pages: the whole pool
    assert kv.max_request_tokens(chunk) == sys.maxsize
    first = make_request("a", range(8))
    assert kv.admit(first, kv.match_prefix(first), chunk)
    for _ in range(4):
        compute(kv, first, chunk)
    kv.free(first)
    request = make_request("b", range(30))
    hit = kv.match_prefix(request)
    assert hit.pages == ([0, 0, 3, 4],)
    # The 2 pages of the hit are released again before the last of 4 others is needed.
    assert kv.admit(request, hit, chunk)
    request.num_computed_tokens = hit.num_tokens
    for _ in range(11):
        compute(kv, request, chunk)
    kv.check_integrity({"b"})


def test_discarded_content_is_not_found_again() -> None:
    kv = make_kv(page_size=2)
    good, bad = make_request("a", [1, 2, 3, 4]), make_request("b", [1, 2, 9, 9, 9])
    run_prompt(kv, good)
    run_prompt(kv, bad)
    kv.discard(bad)
    # The shared head goes too: nobody knows which page is bad.
    assert kv.match_prefix(make_request("c", [1, 2, 9, 9, 9])).num_tokens == 0
    assert kv.num_pages_used == 2
    kv.check_integrity({"a"})


def test_reset_waits_for_requests_that_hold_pages() -> None:
    kv = make_kv(page_size=2)
    request = make_request("a", range(4))
    run_prompt(kv, request)
    assert not kv.reset_prefix_cache()
    kv.free(request)
    probe = make_request("b", range(5))
    assert kv.match_prefix(probe).num_tokens == 4
    assert kv.reset_prefix_cache()
    assert kv.match_prefix(probe).num_tokens == 0
    kv.check_integrity(set())


@pytest.mark.parametrize(
    ("windows", "num_pages", "chunk", "expected"),
    [
        ((None,), 5, 64, 16),  # 4 pages of 4 tokens
        ((8,), 6, 4, sys.maxsize),  # at most ceil((7 + 4) / 4) + 1 = 4 live pages, 5 are there
        ((8,), 4, 4, 12),  # 3 are there: no more tokens than they hold
        ((None, 8), 6, 4, 20),
        ((None, "state"), 6, 64, 20),
        (("state",), 3, 64, sys.maxsize),  # two states are all that a request holds
    ],
)
def test_longest_request_that_can_ever_run(windows, num_pages, chunk, expected) -> None:
    kv = make_kv(windows, page_size=4, num_pages=num_pages)
    assert kv.max_request_tokens(chunk) == expected


def test_integrity_check_sees_a_table_that_differs_from_the_pool() -> None:
    kv = make_kv(page_size=2)
    request = make_request("a", range(4))
    table = run_prompt(kv, request)[0]
    with pytest.raises(IntegrityError, match="other requests"):
        kv.check_integrity(set())
    table[1] = 1
    with pytest.raises(IntegrityError, match="twice in one table"):
        kv.check_integrity({"a"})
    table[1] = 5
    with pytest.raises(IntegrityError, match="reference counts"):
        kv.check_integrity({"a"})


def test_groups_must_agree_on_the_page_size() -> None:
    spec = KVSpec(KVKind.FULL, (2, 1, 1), "float32", 4)
    groups = build_groups([spec], 2) + build_groups([spec], 4)
    with pytest.raises(ValueError, match="one page size"):
        KVManager(groups, [4, 4], enable_prefix_caching=True)
