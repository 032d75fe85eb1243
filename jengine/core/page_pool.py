"""Pages of one KV group: which are held and by how many, which are cached, which are blank."""

from collections import OrderedDict
from collections.abc import Callable, Mapping

NULL_PAGE = 0


class IntegrityError(RuntimeError):
    """The bookkeeping of pages contradicts itself: a bug of the engine, never a client's error."""


class PagePool:
    """Reference counts and free pages. Every page but the null page is in exactly one place:

        blank ──allocate──> held (1 reference or more) ──last release──> cached if kept, else blank
                             ^    ^                                        │
                             │    └──────────────acquire───────────────────┤
                             └── allocate, when no page is blank: evicts the least recently released

    Page 0 is the null page. It stands in page tables for entries that nobody reads, so it belongs
    to no one: it is never handed out, counted or released.

    Blank pages form a stack, apart from the cached ones, so that no cached page is evicted while a
    blank one is left. Cached pages form the LRU: a prefix hit takes a page out of its middle, which
    costs O(n) in a deque. `OrderedDict` is a doubly linked list with an index, in C: O(1) there and
    at both ends, without Python objects for its nodes.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None]) -> None:
        """`num_pages` counts the null page. `on_evict(page)` is told when a kept page is reused."""
        if num_pages < 2:
            raise ValueError(f"a pool needs the null page and one more, got {num_pages} pages")
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._num_refs = [0] * num_pages
        self._blank = list(range(num_pages - 1, NULL_PAGE, -1))  # popped from the end: page 1 first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._kept: set[int] = set()  # pages with findable content, held or cached

    @property
    def num_usable(self) -> int:
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out: blank ones, then cached ones."""
        return len(self._blank) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_usable - self.num_free

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds but a prefix hit can still find."""
        return len(self._cached)

    def num_refs(self, page: int) -> int:
        return self._num_refs[page]

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages whose content may be overwritten, each with one reference."""
        if num_pages > self.num_free:
            raise IntegrityError(f"{num_pages} pages wanted, {self.num_free} are free")
        blank = self._blank
        pages = []
        for _ in range(num_pages):
            page = blank.pop() if blank else self._evict()
            self._num_refs[page] = 1
            pages.append(page)
        return pages

    def acquire(self, page: int) -> None:
        """Share a held page, or take back a cached one with its content."""
        if self._num_refs[page] == 0:
            if page not in self._cached:
                raise IntegrityError(f"page {page} is neither held nor cached")
            del self._cached[page]
        self._num_refs[page] += 1

    def release(self, page: int) -> None:
        num_refs = self._num_refs[page] - 1
        if num_refs < 0:
            raise IntegrityError(f"page {page} released more often than acquired")
        self._num_refs[page] = num_refs
        if num_refs == 0:
            if page in self._kept:
                self._cached[page] = None
            else:
                self._blank.append(page)

    def keep(self, page: int) -> None:
        """Declare the content of a held page findable: its last release caches it."""
        if self._num_refs[page] == 0:
            raise IntegrityError(f"page {page} is kept, but nobody holds it")
        self._kept.add(page)

    def drop(self, page: int) -> None:
        """Take `keep` back: nobody can find the content any more."""
        self._kept.discard(page)
        if page in self._cached:
            del self._cached[page]
            self._blank.append(page)

    def check_integrity(self, num_holders: Mapping[int, int], kept: set[int]) -> None:
        """Compare with what the owner counts: tables that hold each page, and findable pages."""
        blank, cached = set(self._blank), set(self._cached)
        held = {page for page, n in enumerate(self._num_refs) if n > 0}
        if len(blank) != len(self._blank):
            raise IntegrityError("a blank page is listed twice")
        if blank & cached or blank & held or cached & held:
            raise IntegrityError("a page is in two places")
        if blank | cached | held != set(range(NULL_PAGE + 1, self.num_pages)):
            raise IntegrityError("a page is lost, or the null page is in use")
        if {page: self._num_refs[page] for page in held} != dict(num_holders):
            raise IntegrityError("reference counts differ from the page tables")
        if self._kept != kept or blank & kept or cached - kept:
            raise IntegrityError("cached pages differ from the prefix cache")

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._kept.remove(page)
        self._on_evict(page)
        return page
