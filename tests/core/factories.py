"""Small KV managers and requests for the tests of jengine.core."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jengine.core.kv_manager import KVManager
from jengine.core.page_pool import PagePool
from jengine.kv_spec import KVGroup, KVKind, KVSpec, build_groups
from jengine.request import Request, SamplingParams

EOS = 0


@dataclass(frozen=True)
class Every:
    """A layer that keeps one entry for so many tokens, and reads all that are complete."""

    num_tokens: int


# Of a layer; "state": it keeps a state instead
Window: TypeAlias = int | Literal["state"] | Every | None


def tokens_of_whole_entries(windows: Sequence[Window]) -> int:
    """Pages of such sizes hold whole entries of every layer."""
    return math.lcm(*(window.num_tokens for window in windows if isinstance(window, Every)))


def make_groups(windows: Sequence[Window], page_size: int) -> tuple[KVGroup, ...]:
    """One layer for each entry: None is full attention, a number its window."""
    return build_groups([_spec(window) for window in windows], page_size)


def _spec(window: Window) -> KVSpec:
    if window == "state":
        return KVSpec(KVKind.STATE, (8,), "float32", 4)
    if isinstance(window, Every):
        return KVSpec(KVKind.MLA, (2,), "float32", 4, tokens_per_entry=window.num_tokens)
    kind = KVKind.FULL if window is None else KVKind.SLIDING_WINDOW
    return KVSpec(kind, (2, 1, 1), "float32", 4, window)


def make_kv(
    windows: Sequence[Window] = (None,),
    *,
    page_size: int = 4,
    num_pages: int = 17,
    caching: bool = True,
    fingerprint: str = "",
) -> KVManager:
    groups = make_groups(windows, page_size)
    return KVManager(
        groups,
        [num_pages] * len(groups),
        enable_prefix_caching=caching,
        fingerprint=fingerprint,
    )


def make_request(
    request_id: str,
    prompt: Sequence[int],
    *,
    priority: int = 0,
    cache_salt: str = "",
    arrival_time: float = 0.0,
    **sampling: Any,
) -> Request:
    return Request(
        request_id,
        list(prompt),
        SamplingParams(temperature=0.0, **sampling),
        eos_token_ids=frozenset({EOS}),
        priority=priority,
        cache_salt=cache_salt,
        arrival_time=arrival_time,
    )


def record_allocations(pool: PagePool) -> set[int]:
    """A live set of the pages that the pool has handed out to be written; the caller clears it."""
    fresh: set[int] = set()
    allocate = pool.allocate

    def recorded(num_pages: int) -> list[int]:
        pages = allocate(num_pages)
        fresh.update(pages)
        return pages

    pool.allocate = recorded  # type: ignore[method-assign]
    return fresh
