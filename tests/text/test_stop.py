"""Stop strings against an oracle that looks at the whole text after every character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jengine.text.stop import StopChecker

PIECES = st.lists(st.text("ab<|", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab<|", min_size=1, max_size=4), min_size=1, max_size=4)


def naive(text: str, stops: list[str], include: bool, first: int = 0) -> tuple[str, str | None]:
    """(kept text, stop string). A stop string counts if it ends beyond character `first`."""
    for end in range(first + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[:end] if include else text[: end - len(stop)], stop
    return text, None


@given(PIECES, STOPS, st.booleans())
def test_equals_the_oracle_however_the_text_is_cut(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    checker = StopChecker(stops, include_stop_str_in_output=include)
    text, stop = naive("".join(pieces), stops, include)
    given_out, seen = "", ""
    for piece in pieces:
        seen += piece
        given_out += checker.add(piece)
        assert text.startswith(given_out)  # nothing is ever taken back
        if checker.match is None:
            assert len(seen) - len(given_out) <= max(map(len, stops)) - 1
    given_out += checker.finish()
    assert given_out == text
    assert (checker.match.stop if checker.match else None) == stop


@given(PIECES, PIECES, STOPS)
def test_before_min_tokens_nothing_matches_but_a_match_may_begin(
    early: list[str], late: list[str], stops: list[str]
) -> None:
    """The oracle cuts only text that was not given out before: a match inside early text is out of
    reach.
    """
    checker = StopChecker(stops)
    for piece in early:
        checker.add(piece, may_match=False)
        assert checker.match is None
    before = "".join(early)
    for piece in late:
        checker.add(piece)
    _, stop = naive(before + "".join(late), stops, False, first=len(before))
    assert (checker.match.stop if checker.match else None) == stop


def test_text_that_cannot_be_a_stop_string_is_not_held_back() -> None:
    checker = StopChecker(["</answer>"])
    assert checker.add("hello <") == "hello "
    assert checker.add("/ans") == ""
    assert checker.add("!") == "</ans!"


def test_matches_across_many_pieces_of_one_character() -> None:
    checker = StopChecker(["世界の終わり"])
    assert [checker.add(c) for c in "この世界の終わりだ"] == ["こ", "の", *[""] * 7]
    assert checker.match is not None and checker.finish() == ""


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopChecker(["a", ""])
