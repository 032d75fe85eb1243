"""What `SamplingParams` says by itself: repetition, temperature."""

import itertools
import logging

import pytest

from jengine.errors import InvalidRequestError
from jengine.request import RepetitionDetectionParams, SamplingParams


def repeats(tokens: list[int], smallest: int, largest: int, count: int) -> bool:
    """By comparing copies, where the engine compares neighbours."""
    return any(
        len(tokens) >= size * count and tokens[-size * count :] == tokens[-size:] * count
        for size in range(max(smallest, 1), largest + 1)
    )


def test_repetition_is_found_where_a_pattern_ends_the_text() -> None:
    found = 0
    for length in range(9):
        for tokens in itertools.product((0, 1), repeat=length):
            text = [0, 1, 0, 1, *tokens]  # a prompt that does not count
            for smallest, largest, count in ((0, 1, 2), (0, 3, 2), (2, 2, 3), (1, 4, 2), (0, 0, 0)):
                params = RepetitionDetectionParams(
                    min_pattern_size=smallest, max_pattern_size=largest, min_count=count
                )
                expected = repeats(list(tokens), smallest, largest, count)
                assert params.is_met(text, length) == expected
                found += expected
    assert found > 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(max_pattern_size=3, min_count=1), "min_count must be at least 2, got 1"),
        (dict(max_pattern_size=3, min_pattern_size=4, min_count=2), "got 4 and 3"),
        (dict(max_pattern_size=513, min_count=2), "<= 512"),
    ],
)
def test_repetition_has_bounds(fields: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        RepetitionDetectionParams(**fields)


def test_a_small_temperature_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert SamplingParams(temperature=0.005).temperature == 0.01
    assert "raised to 0.01" in caplog.text
    assert SamplingParams(temperature=1e-6).is_greedy
    assert SamplingParams(temperature=0.01).temperature == 0.01
