"""Entries that stand for several tokens, and the pages that hold them."""

import pytest

from jengine.kv_spec import KVKind, KVSpec, build_groups
from tests.core.factories import Every, make_groups, make_kv, make_request
from tests.core.test_kv_manager import admit, compute

ENTRY = (512,)


def latent(tokens_per_entry: int) -> KVSpec:
    return KVSpec(KVKind.MLA, ENTRY, "bfloat16", 2, tokens_per_entry=tokens_per_entry)


def test_a_page_holds_an_entry_for_so_many_tokens() -> None:
    one, four = build_groups([latent(1), latent(4), latent(4)], 32)
    assert (one.page_shape, four.page_shape) == ((32, *ENTRY), (8, *ENTRY))
    assert four.bytes_per_page == 2 * 8 * 1024
    # In tokens both are alike: as many pages, of as many tokens.
    assert one.max_pages(1000, 64) == four.max_pages(1000, 64) == 32


def test_pages_are_as_large_as_whole_entries_ask_for() -> None:
    assert {g.page_size for g in build_groups([latent(1), latent(4)])} == {16}
    assert {g.page_size for g in build_groups([latent(4), latent(128)])} == {128}
    assert {g.page_size for g in build_groups([latent(3), latent(8)])} == {48}
    with pytest.raises(ValueError, match=r"page_size must be a multiple of 128, .* got 64"):
        build_groups([latent(4), latent(128)], 64)


@pytest.mark.parametrize(
    ("kind", "tokens_per_entry", "message"),
    [(KVKind.MLA, 0, "tokens_per_entry must be >= 1"), (KVKind.STATE, 4, "not for states")],
)
def test_specs_that_make_no_sense(kind: KVKind, tokens_per_entry: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVSpec(kind, ENTRY, "float32", 4, tokens_per_entry=tokens_per_entry)


def test_a_hit_ends_with_whole_entries() -> None:
    """Pages of 8 tokens: 4 entries in one group, 2 in the other, whose tables are alike."""
    windows = (Every(2), Every(4))
    assert [group.entries_per_page for group in make_groups(windows, 8)] == [4, 2]
    kv = make_kv(windows, page_size=8)
    first = make_request("a", range(21))
    admit(kv, first)
    assert compute(kv, first, 21) == ([1, 2, 3], [1, 2, 3])
    assert kv.match_prefix(make_request("b", range(40))).num_tokens == 16
