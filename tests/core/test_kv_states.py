"""The states of linear attention in the KV manager, worked out by hand. Pages of 4 tokens; group 0
attends fully, group 1 keeps states; pages are handed out in the order 1, 2, 3, ...
"""

from jengine.core.kv_manager import KVManager
from tests.core.factories import make_groups, make_kv, make_request
from tests.core.test_kv_manager import CHUNK, admit, compute, run_prompt


def test_a_step_leaves_one_state_and_reads_one() -> None:
    kv = make_kv((None, "state"), page_size=4)
    request = make_request("a", range(14))
    admit(kv, request)
    assert compute(kv, request, 10) == ([1, 2, 3], [0, 0, 1])
    # Tokens 10 and 11 go on from state 1, and leave theirs in its place.
    assert compute(kv, request, 2)[1] == [0, 0, 1]
    assert compute(kv, request, 2)[1] == [0, 0, 1, 2]
    kv.check_integrity({"a"})
    kv.free(request)
    assert kv.num_pages_used == 0
    kv.check_integrity(set())


def test_whoever_begins_alike_goes_on_from_where_a_step_ended_on_a_page() -> None:
    kv = make_kv((None, "state"), page_size=4)
    first = make_request("a", range(14))
    admit(kv, first)
    for num_tokens in (8, 3, 3):  # ends at 8, 11, 14: one of them ends a page
        compute(kv, first, num_tokens)
    kv.free(first)
    second = make_request("b", range(14))
    assert admit(kv, second) == 8
    assert compute(kv, second, 6)[1][:2] == [0, 1]
    kv.check_integrity({"b"})


def test_a_state_is_found_only_after_the_step_that_leaves_it() -> None:
    """Other than keys and values, which all are there before any query of the step reads."""
    kv = make_kv((None, "state"), page_size=4)
    first, twin = make_request("a", range(9)), make_request("b", range(9))
    admit(kv, first)
    compute(kv, first, 8)
    assert kv.match_prefix(twin).num_tokens == 0
    compute(kv, first, 1)  # reads it still
    assert kv.match_prefix(twin).num_tokens == 0
    first.token_ids.append(9)
    compute(kv, first, 1)
    assert kv.match_prefix(twin).num_tokens == 8


def test_a_snapshot_waits_until_its_tokens_are_known() -> None:
    kv = make_kv((None, "state"), page_size=4)
    request = make_request("a", range(3))
    admit(kv, request)
    compute(kv, request, 3)
    tables = kv.allocate(request, 6, 6)  # six decode steps at once
    request.num_computed_tokens, request.num_pending_tokens = 9, 7
    assert tables is not None
    assert tables[1] == [1, 2, 3]
    compute(kv, request, 1)
    assert tables[1] == [1, 2, 3]  # one state is read; two wait
    request.token_ids += range(3, 10)
    request.num_pending_tokens = 1
    compute(kv, request, 1)
    assert tables[1] == [0, 0, 3]
    assert kv.match_prefix(make_request("b", range(10))).num_tokens == 8
    kv.check_integrity({"a"})


def test_snapshots_that_wait_give_way() -> None:
    kv = KVManager(make_groups((None, "state"), 4), [9, 4], enable_prefix_caching=True)
    request = make_request("a", range(3))
    admit(kv, request)
    compute(kv, request, 3)
    tables = kv.allocate(request, 9, 9)
    request.num_computed_tokens, request.num_pending_tokens = 12, 10
    assert tables is not None
    assert tables[1] == [1, 2, 3]  # all that there are
    assert compute(kv, request, 1)[1] == [0, 0, 3, 2]
    kv.check_integrity({"a"})


def test_no_more_requests_run_than_have_two_states() -> None:
    kv = KVManager(make_groups((None, "state"), 4), [40, 6], enable_prefix_caching=True)
    first, second, third = (make_request(name, range(4)) for name in "abc")
    run_prompt(kv, first)
    run_prompt(kv, second)
    assert not kv.admit(third, kv.match_prefix(third), CHUNK)  # 3 of 5 are free
    kv.free(first)
    assert admit(kv, third) == 0


def test_content_that_is_discarded_is_not_found() -> None:
    kv = make_kv((None, "state"), page_size=4)
    request = make_request("a", range(10))
    admit(kv, request)
    compute(kv, request, 8)
    compute(kv, request, 2)
    kv.discard(request)
    assert kv.match_prefix(make_request("b", range(10))).num_tokens == 0
    kv.check_integrity(set())


def test_without_prefix_caching_every_state_is_blank_again() -> None:
    kv = make_kv((None, "state"), page_size=4, caching=False)
    request = make_request("a", range(9))
    run_prompt(kv, request)
    kv.free(request)
    assert [group.pool.num_cached for group in kv._groups] == [0, 0]
