"""What one layer stores for a request, and which layers share page tables. Pure data: no jax, no
ownership.

Layers declare a `KVSpec`, or several where they keep things of several kinds; equal specs form a
`KVGroup`; a request holds one page table per group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class KVKind(StrEnum):
    """How a layer's state grows with the tokens of a request."""

    FULL = "full"  # every token keeps its entry
    SLIDING_WINDOW = "sliding_window"  # only the last `window` tokens are read
    MLA = "mla"  # every token keeps one latent entry, which all heads read as key and value, and
    # beside it an index key where attention is sparse
    STATE = "state"  # one entry of fixed size stands for all tokens so far (linear attention)


STATE_LOOKBACK = 2  # a token starts from the state that the one before it left
MAX_LIVE_STATES = 2  # of a request: the one that its step reads, and the one that it leaves
DEFAULT_PAGE_SIZE = 16  # tokens; more where an entry stands for more


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one attention layer stores: `entry_shape` elements of `dtype` for each token, or for
    each page if the kind is STATE: the state after the newest token of that page at which a step
    ended.

    `window` counts the tokens a query may read, itself included (Hugging Face `sliding_window`).

    With `tokens_per_entry` > 1 an entry stands for so many tokens at once, aligned to that number:
    it is written with the last of them, and what a page holds of it depends on them and the tokens
    before them. Pages hold whole entries, so whatever is true of a page's tokens is of its entries.
    """

    kind: KVKind
    entry_shape: tuple[int, ...]  # (2, K, H) for keys and values; (E,) for a latent or a state
    dtype: str
    itemsize: int
    window: int | None = None
    tokens_per_entry: int = 1

    def __post_init__(self) -> None:
        if (self.kind is KVKind.SLIDING_WINDOW) != (self.window is not None):
            raise ValueError("window is given exactly for sliding-window layers")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be >= 1, got {self.window}")
        if self.tokens_per_entry < 1:
            raise ValueError(f"tokens_per_entry must be >= 1, got {self.tokens_per_entry}")
        if self.is_state and self.tokens_per_entry > 1:
            raise ValueError("tokens_per_entry is not for states: one stands for all tokens")

    @property
    def is_state(self) -> bool:
        return self.kind is KVKind.STATE

    @property
    def lookback(self) -> int | None:
        """Tokens whose pages a query reads, itself included; None: all."""
        return STATE_LOOKBACK if self.is_state else self.window

    @property
    def bytes_per_entry(self) -> int:
        size = self.itemsize
        for n in self.entry_shape:
            size *= n
        return size


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one page table, and one `PagePool` of pages of `page_size` tokens."""

    spec: KVSpec
    layers: tuple[int, ...]
    page_size: int

    def __post_init__(self) -> None:
        if self.page_size % self.spec.tokens_per_entry:
            raise ValueError(
                f"page_size must be a multiple of {self.spec.tokens_per_entry}, the tokens that "
                f"one entry of this model's cache stands for, got {self.page_size}"
            )

    @property
    def entries_per_page(self) -> int:
        return 1 if self.spec.is_state else self.page_size // self.spec.tokens_per_entry

    @property
    def page_shape(self) -> tuple[int, ...]:
        """Of one page, in one layer."""
        shape = self.spec.entry_shape
        return shape if self.spec.is_state else (self.entries_per_page, *shape)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers of the group."""
        return self.spec.bytes_per_entry * self.entries_per_page * len(self.layers)

    def max_pages(self, num_tokens: int, max_chunk: int) -> int:
        """Most pages one request of `num_tokens` holds at once when at most `max_chunk` tokens run
        in a step.
        """
        pages = -(-num_tokens // self.page_size)
        if self.spec.is_state:
            return min(pages, MAX_LIVE_STATES)
        if self.spec.window is None:
            return pages
        live = self.spec.window - 1 + max_chunk
        return min(pages, -(-live // self.page_size) + 1)


def build_groups(specs: Sequence[KVSpec], page_size: int | None = None) -> tuple[KVGroup, ...]:
    """Group the layers of a model by equal spec, in order of first appearance, states last: the
    first group's pages are what a number of pages counts.

    `page_size` in tokens; None: `DEFAULT_PAGE_SIZE`, or its least multiple whose pages hold whole
    entries. Raises `ValueError` if those of a given size do not.
    """
    if page_size is None:
        page_size = math.lcm(DEFAULT_PAGE_SIZE, *(spec.tokens_per_entry for spec in specs))
    layers_of: dict[KVSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        layers_of.setdefault(spec, []).append(layer)
    ordered = sorted(layers_of.items(), key=lambda item: item[0].is_state)
    return tuple(KVGroup(spec, tuple(layers), page_size) for spec, layers in ordered)
