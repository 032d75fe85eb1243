"""Page tables of every request, in every KV group. The only caller of `PagePool`.

Who owns which pages of a request, in one group, while the step over tokens [start, end) is planned:

    [0, first live)             null in the table: fell out of the window and was released
    [first live, num hit)       shared: found in the prefix cache at admission, never written by it
    [num hit, num registered)   full, findable by others, so never written again
    [num registered, ...)       its own, in no other table; tokens [start, end) are written here

Shared pages are full and full pages are not written, so nothing is ever copied on write.

Groups of states are paged too. Entry i of such a table is the state after the newest token of page
i at which a step ended, so a step reads the page of the token before it, as a window of two would,
and leaves its state in that of its last token; pages that it passes stay null. What a full page
holds, if a step ended just there, is a snapshot: whoever begins with these tokens goes on from it.
It becomes findable when its owner lets it go. Until then it is the owner's alone, since, other than
keys, a state is not there before its step has run.

Pages change hands on the host when a step is *planned*, while older steps may still run. That is
safe because the device executes steps in the order of their dispatch: whatever an older step reads
or writes in a page happens before a newer step, planned for the page's next owner, touches it.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from jengine.core.page_pool import NULL_PAGE, IntegrityError, PagePool
from jengine.core.prefix_cache import PageHasher, PrefixCache
from jengine.kv_spec import MAX_LIVE_STATES, KVGroup
from jengine.request import Request

PageTables = tuple[list[int], ...]


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """A cached prefix: its pages in each group, null where no query after it will look."""

    num_tokens: int
    pages: PageTables


@dataclass(slots=True, eq=False)
class _Held:
    """Pages of one admitted request. All tables have equal length, and only ever grow."""

    page_tables: PageTables
    num_registered: int  # leading pages that need no more registering
    first_live: list[int] = field(default_factory=list)  # per group: pages before it are null
    snapshots: set[int] = field(default_factory=set)  # pages at whose end a step ended


class KVManager:
    """Gives pages to requests, all groups or none, and remembers what finished pages hold."""

    def __init__(
        self,
        groups: tuple[KVGroup, ...],
        num_pages: Sequence[int],
        *,
        enable_prefix_caching: bool,
        fingerprint: str = "",
    ) -> None:
        """`num_pages[g]` is the size of group g's arrays: it counts the null page."""
        page_sizes = {group.page_size for group in groups}
        if len(page_sizes) != 1 or len(groups) != len(num_pages):
            raise ValueError("groups must share one page size and have one page count each")
        self.page_size = page_sizes.pop()
        self.enable_prefix_caching = enable_prefix_caching
        self._groups = tuple(_Group(g, n) for g, n in zip(groups, num_pages, strict=True))
        self._windows = tuple((i, g) for i, g in enumerate(self._groups) if g.window is not None)
        self._states = tuple((i, g) for i, g in self._windows if g.is_state)
        self._hasher = PageHasher(self.page_size, fingerprint)
        self._held: dict[str, _Held] = {}
        self._chains: dict[str, list[bytes]] = {}  # digests, of waiting requests too

    @property
    def num_pages_total(self) -> int:
        return sum(group.pool.num_usable for group in self._groups)

    @property
    def num_pages_used(self) -> int:
        """Pages that requests hold; cached pages are free."""
        return sum(group.pool.num_held for group in self._groups)

    def max_request_tokens(self, max_chunk: int) -> int:
        """Most tokens one request can ever hold, alone, in chunks of `max_chunk`; `sys.maxsize` if
        every group is a window that fits."""
        limit = sys.maxsize
        for group in self._groups:
            num_usable = group.pool.num_usable
            num_tokens = num_usable * self.page_size
            if group.spec.max_pages(num_tokens + 1, max_chunk) > num_usable:
                limit = min(limit, num_tokens)
        return limit

    def match_prefix(self, request: Request) -> PrefixHit:
        """The longest cached prefix that is valid in all groups; takes no reference yet.

        At least the last token is left to compute: its logits are what the request came for.
        """
        num_pages = 0
        chain: list[bytes] = []
        if self.enable_prefix_caching and request.sampling.reads_prefix_cache:
            num_pages = (request.num_tokens - 1) // self.page_size
            chain = self._extend_chain(request, num_pages)
        # Each group shortens the hit to what it can serve; windows do not serve every shorter hit,
        # so go round until all agree.
        previous = -1
        while num_pages != previous:
            previous = num_pages
            for group in self._groups:
                num_pages = group.longest_hit(chain, num_pages)
        pages = tuple(group.hit_pages(chain, num_pages) for group in self._groups)
        return PrefixHit(num_pages * self.page_size, pages)

    def admit(self, request: Request, hit: PrefixHit, max_chunk: int) -> bool:
        """Take the hit's pages if all tokens of the request, in chunks of `max_chunk`, fit now."""
        num_new_tokens = request.num_tokens - hit.num_tokens
        # Requests that began together pass a page's end together, again and again: each must find
        # its second state then, or they would preempt each other for ever.
        num_states = (len(self._held) + 1) * MAX_LIVE_STATES
        if self._held and any(num_states > g.pool.num_usable for _, g in self._states):
            return False
        for group, pages in zip(self._groups, hit.pages, strict=True):
            # Cached pages of the hit count as free until it takes them, so they are needed too:
            # all of them besides the new ones, or fewer where a window leaves them behind.
            num_revived = sum(1 for p in pages if p != NULL_PAGE and group.pool.num_refs(p) == 0)
            num_needed = min(
                num_revived + group.spec.max_pages(num_new_tokens, max_chunk),
                group.spec.max_pages(request.num_tokens, max_chunk),
            )
            if num_needed > group.pool.num_free:
                return False
        for group, pages in zip(self._groups, hit.pages, strict=True):
            for page in pages:
                if page != NULL_PAGE:
                    group.pool.acquire(page)
        self._held[request.request_id] = _Held(
            page_tables=tuple(list(pages) for pages in hit.pages),
            num_registered=hit.num_tokens // self.page_size,
            first_live=[group.first_page_read(hit.num_tokens) for group in self._groups],
        )
        return True

    def allocate(
        self, request: Request, num_new_tokens: int, num_steps: int = 1
    ) -> PageTables | None:
        """Pages for the next `num_new_tokens` tokens: the request's live tables, or None if a group
        has too few. The caller must schedule exactly these tokens in the step it plans, or one in
        each of `num_steps` steps.

        Full pages are registered now, before the step runs, as soon as the host knows their tokens:
        a twin admitted into the same step shares them, because in each layer the keys and values of
        all tokens are written before any query reads. A page whose last token is still on the
        device is registered when a later step is planned.
        """
        held = self._held[request.request_id]
        start = request.num_computed_tokens
        end = start + num_new_tokens
        for index, group in self._windows:
            first = min(start, len(request.token_ids)) if group.is_state else start
            self._release_unread(request, held, index, group.first_page_read(first))
        tables = held.page_tables
        page_size = self.page_size
        if end > len(tables[0]) * page_size:
            num_new_pages = -(-end // page_size) - len(tables[0])
            num_fresh = [group.num_fresh(num_new_pages, num_steps) for group in self._groups]
            if not self._have_free(num_fresh):
                # Snapshots that are kept only until the host knows their tokens give way.
                for index, group in self._states:
                    self._release_unread(request, held, index, group.first_page_read(start))
                if not self._have_free(num_fresh):
                    return None
            for group, table, num in zip(self._groups, tables, num_fresh, strict=True):
                table += [NULL_PAGE] * (num_new_pages - num)
                table += group.pool.allocate(num)
        if self._states:
            ends = range(start + 1, end + 1) if num_steps > 1 else (end,)
            held.snapshots.update(e // page_size - 1 for e in ends if e % page_size == 0)
        if (
            self.enable_prefix_caching
            and min(end, len(request.token_ids)) // page_size > held.num_registered
        ):
            self._register(request, held, end)
        return tables

    def cut_chunk(self, start: int, num_tokens: int) -> int:
        """How many of `num_tokens` to compute where a prompt has to be cut anyway: with states, up
        to the end of a page, so that the state can be found again."""
        end = (start + num_tokens) // self.page_size * self.page_size
        return end - start if self._states and end > start else num_tokens

    def has_room_ahead(self, num_requests: int, num_tokens: int) -> bool:
        """Whether so many requests can be given `num_tokens` more tokens each, whatever pages they
        have. Counts up to one page too many for each, which is cheaper than to look."""
        num_pages = num_requests * -(-num_tokens // self.page_size)
        return all(group.pool.num_free >= num_pages for group in self._groups)

    def free(self, request: Request) -> None:
        """Give everything back: finished, preempted, aborted, or never admitted.

        Tail pages first, so that the LRU evicts a prefix from its end: the head serves more
        requests, and a tail without its head is never found.
        """
        held = self._held.pop(request.request_id, None)
        if held is not None:
            self._register(request, held, request.num_computed_tokens)
            for group, table in zip(self._groups, held.page_tables, strict=True):
                for index in reversed(range(len(table))):
                    self._release(request, held, group, table, index)
        self._chains.pop(request.request_id, None)

    def discard(self, request: Request) -> None:
        """Free, and make the request's content unfindable: its pages may hold NaN."""
        self.free(request)
        if self.enable_prefix_caching:
            chain = self._extend_chain(request, request.num_tokens // self.page_size)
            del self._chains[request.request_id]
            for group in self._groups:
                for digest in chain[1:]:
                    group.forget(digest)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content (weights changed). False, and nothing is done, while a request
        holds pages: those it fills later would mix old and new content under one digest."""
        if self._held:
            return False
        for group in self._groups:
            for page in group.cache.pages:
                group.cache.forget(page)
                group.pool.drop(page)
        return True

    def check_integrity(self, holders: set[str]) -> None:
        """Raise `IntegrityError` unless pools, page tables and prefix caches tell one story, and
        exactly the requests in `holders` hold pages."""
        if self._held.keys() != holders:
            raise IntegrityError("pages are held for other requests than those that run")
        for index, group in enumerate(self._groups):
            num_holders: Counter[int] = Counter()
            for held in self._held.values():
                table = held.page_tables[index]
                live = table[held.first_live[index] :]
                if group.is_state:  # null where no step ended, so not at the end
                    live = [page for page in live[:-1] if page != NULL_PAGE] + live[-1:]
                if len(table) != len(held.page_tables[0]) or len(set(live)) != len(live):
                    raise IntegrityError("a page is twice in one table, or tables differ in length")
                if NULL_PAGE in live or any(table[: held.first_live[index]]):
                    raise IntegrityError("null pages are not exactly those out of the window")
                num_holders.update(live)
            group.cache.check_integrity()
            group.pool.check_integrity(num_holders, group.cache.pages)

    def _have_free(self, num_pages: Sequence[int]) -> bool:
        """Of each group."""
        return all(g.pool.num_free >= n for g, n in zip(self._groups, num_pages, strict=True))

    def _release_unread(self, request: Request, held: _Held, index: int, first_read: int) -> None:
        """Release pages that no query of this step or a later one reads."""
        first_live = held.first_live[index]
        if first_read > first_live:
            table = held.page_tables[index]
            for i in range(first_live, first_read):
                self._release(request, held, self._groups[index], table, i)
                table[i] = NULL_PAGE
            held.first_live[index] = first_read

    def _release(
        self, request: Request, held: _Held, group: "_Group", table: list[int], index: int
    ) -> None:
        """Of the page in the table, if it is not null; a snapshot becomes findable."""
        page = table[index]
        if page == NULL_PAGE:
            return
        if group.is_state and self.enable_prefix_caching and index in held.snapshots:
            num_tokens = (index + 1) * self.page_size
            if num_tokens <= min(request.num_computed_tokens, request.num_tokens):
                group.register(self._extend_chain(request, index + 1)[index + 1], page)
        group.pool.release(page)

    def _register(self, request: Request, held: _Held, num_written: int) -> None:
        """Make pages findable that are full, written by then, and whose tokens the host knows."""
        if not self.enable_prefix_caching:
            return
        num_full = min(num_written, request.num_tokens) // self.page_size
        chain = self._extend_chain(request, num_full)
        for index in range(held.num_registered, num_full):
            for group, table in zip(self._groups, held.page_tables, strict=True):
                if table[index] != NULL_PAGE and not group.is_state:
                    group.register(chain[index + 1], table[index])
        held.num_registered = num_full

    def _extend_chain(self, request: Request, num_pages: int) -> list[bytes]:
        chain = self._chains.get(request.request_id)
        if chain is None:
            chain = self._chains[request.request_id] = self._hasher.start(request.cache_salt)
        self._hasher.extend(chain, request.token_ids, num_pages)
        return chain


class _Group:
    """Pool and prefix cache of one KV group, and what its queries read."""

    def __init__(self, spec: KVGroup, num_pages: int) -> None:
        self.spec = spec
        self.window = spec.spec.lookback
        self.is_state = spec.spec.is_state
        self.cache = PrefixCache()
        self.pool = PagePool(num_pages, on_evict=self.cache.forget)

    def num_fresh(self, num_new_pages: int, num_steps: int) -> int:
        """How many of the pages by which a table grows are real: a step leaves one state."""
        return min(num_new_pages, num_steps) if self.is_state else num_new_pages

    def first_page_read(self, position: int) -> int:
        """The first page that queries at `position` and later read."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self.spec.page_size

    def longest_hit(self, chain: Sequence[bytes], num_pages: int) -> int:
        """Most leading pages, up to `num_pages`, after which a request can go on.

        A window needs only the pages that reach into it, so it is scanned from its end: pages
        [start, end) are known to be cached.
        """
        if self.window is None:
            for i in range(num_pages):
                if not self.cache.lookup(chain[i + 1]):
                    return i
            return num_pages
        start = end = num_pages
        while start > self.first_page_read(end * self.spec.page_size):
            start -= 1
            if not self.cache.lookup(chain[start + 1]):
                end = start
        return end

    def hit_pages(self, chain: Sequence[bytes], num_pages: int) -> list[int]:
        first = self.first_page_read(num_pages * self.spec.page_size)
        cached = [self.cache.lookup(digest) for digest in chain[first + 1 : num_pages + 1]]
        return [NULL_PAGE] * first + cached

    def register(self, digest: bytes, page: int) -> None:
        """Make a held page findable, unless a page with equal content is held by another.

        A copy that nobody holds gives way: it becomes blank at once, and the chain's pages stay
        neighbours in the LRU.
        """
        twin = self.cache.lookup(digest)
        if twin != NULL_PAGE:
            if self.pool.num_refs(twin) > 0:
                return
            self.forget(digest)
        self.cache.insert(digest, page)
        self.pool.keep(page)

    def forget(self, digest: bytes) -> None:
        page = self.cache.lookup(digest)
        if page != NULL_PAGE:
            self.cache.forget(page)
            self.pool.drop(page)
