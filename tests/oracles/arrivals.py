"""Random traffic for an engine core: who arrives when, with what, and who leaves early."""

import dataclasses

from hypothesis import strategies as st


@dataclasses.dataclass(frozen=True)
class Arrival:
    """`params` is an index into the test's own list of sampling parameters."""

    prompt_seed: int
    prompt_length: int
    params: int
    seed: int
    turns_before: int
    abort_after: int | None


def arrivals(
    num_params: int, *, max_length: int, max_turns: int, max_size: int
) -> st.SearchStrategy[list[Arrival]]:
    return st.lists(
        st.builds(
            Arrival,
            prompt_seed=st.integers(0, 3),  # few: prefixes are shared
            prompt_length=st.integers(1, max_length),
            params=st.integers(0, num_params - 1),
            seed=st.integers(0, 2**63 - 1),
            turns_before=st.integers(0, max_turns),
            abort_after=st.one_of(st.none(), st.none(), st.integers(0, 6)),
        ),
        min_size=1,
        max_size=max_size,
    )
