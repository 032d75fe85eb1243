"""`KVManager` with its pools and prefix caches, against a model that knows what every page holds.

The model keeps the true tokens of each request, which the host learns late, as with steps in
flight, and the context under which each slot was last written. A group of states has one slot a
page, written where a step ends; a group with several tokens an entry one for each such number.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from jengine.core.page_pool import NULL_PAGE
from jengine.request import Request
from tests.core.factories import (
    Every,
    Window,
    make_kv,
    make_request,
    record_allocations,
    tokens_of_whole_entries,
)

MAX_CHUNK = 8
TOKENS = st.integers(0, 1)  # few, so that prefixes meet
Context = tuple[str, tuple[int, ...]]  # salt, and all tokens up to the slot's own


@dataclass(eq=False)
class Tracked:
    request: Request
    tokens: list[int]  # known and pending
    contexts: list[list[Context]] = field(default_factory=list)


def context(tracked: Tracked, position: int) -> Context:
    return tracked.request.cache_salt, tuple(tracked.tokens[: position + 1])


class KVMachine(RuleBasedStateMachine):
    """Steps run at once, in the order in which they are planned."""

    requests = Bundle("requests")

    @initialize(
        windows=st.sampled_from(
            [
                *((None,), (3,), (None, 4), (None, 2, 7), (5, 1), (None, "state"), (4, "state")),
                *((Every(2),), (Every(1), Every(3), 4, "state")),
            ]
        ),
        page_size=st.integers(1, 3),
        num_pages=st.integers(6, 14),
    )
    def build(self, windows: tuple[Window, ...], page_size: int, num_pages: int) -> None:
        self.windows = windows
        self.page_size = page_size * tokens_of_whole_entries(windows)
        self.kv = make_kv(windows, page_size=self.page_size, num_pages=num_pages)
        self.fresh = [record_allocations(group.pool) for group in self.kv._groups]
        self.running: list[Tracked] = []
        self.num_added = 0
        self.written: list[dict[tuple[int, int], Context]] = [{} for _ in windows]

    @rule(
        target=requests,
        prompt=st.lists(TOKENS, min_size=1, max_size=14),
        salt=st.sampled_from(["", "", "s"]),
    )
    def admit(self, prompt: list[int], salt: str) -> object:
        self.num_added += 1
        request = make_request(str(self.num_added), prompt, cache_salt=salt)
        hit = self.kv.match_prefix(request)
        assert hit.num_tokens <= len(prompt) - 1
        assert hit.num_tokens % self.page_size == 0
        assert hit.num_tokens == self.longest_hit(request), "not the longest hit"
        if not self.kv.admit(request, hit, MAX_CHUNK):
            self.kv.free(request)
            return multiple()
        request.num_computed_tokens = hit.num_tokens
        tracked = Tracked(request, list(prompt))
        self.running.append(tracked)
        # A request that was admitted gets the pages of its first chunk.
        self.compute(tracked, min(MAX_CHUNK, len(prompt) - hit.num_tokens))
        return tracked

    @rule(tracked=requests, num_tokens=st.integers(1, MAX_CHUNK))
    def grow(self, tracked: Tracked, num_tokens: int) -> None:
        wanted = len(tracked.tokens) - tracked.request.num_computed_tokens
        if tracked in self.running and wanted > 0:
            self.compute(tracked, min(num_tokens, wanted), may_fail=True)

    @rule(tracked=requests, sampled=st.lists(TOKENS, min_size=2, max_size=4))
    def run_several_steps(self, tracked: Tracked, sampled: list[int]) -> None:
        """In one dispatch, of one token each; each but the last is computed by the next step."""
        request, num_steps = tracked.request, len(sampled)
        wanted = len(tracked.tokens) - request.num_computed_tokens
        if tracked in self.running and wanted == 1 and self.kv.has_room_ahead(1, num_steps):
            tracked.tokens += sampled
            request.num_pending_tokens += num_steps
            self.compute(tracked, num_steps, num_steps=num_steps)

    @rule(tracked=requests, token=TOKENS)
    def sample(self, tracked: Tracked, token: int) -> None:
        if tracked in self.running and len(tracked.tokens) < 24:
            tracked.tokens.append(token)
            tracked.request.num_pending_tokens += 1

    @rule(tracked=requests)
    def learn(self, tracked: Tracked) -> None:
        request = tracked.request
        if tracked in self.running and request.num_pending_tokens:
            request.token_ids.append(tracked.tokens[request.num_tokens])
            request.num_pending_tokens -= 1

    @rule(tracked=consumes(requests))
    def free(self, tracked: Tracked) -> None:
        if tracked in self.running:
            self.kv.free(tracked.request)
            self.running.remove(tracked)

    @rule(tracked=consumes(requests))
    def discard(self, tracked: Tracked) -> None:
        if tracked in self.running:
            self.kv.discard(tracked.request)
            self.running.remove(tracked)
            again = make_request(
                "again", tracked.request.token_ids, cache_salt=tracked.request.cache_salt
            )
            assert self.kv.match_prefix(again).num_tokens == 0 or self.is_window_only()
            self.kv.free(again)

    @rule()
    def reset(self) -> None:
        assert self.kv.reset_prefix_cache() == (not self.running)

    @invariant()
    def adds_up(self) -> None:
        self.kv.check_integrity({t.request.request_id for t in self.running})
        held = 0
        for index in range(len(self.windows)):
            tables = (self.kv._held[t.request.request_id].page_tables for t in self.running)
            held += len({page for table in tables for page in table[index]} - {NULL_PAGE})
        assert self.kv.num_pages_used == held

    @invariant()
    def tables_hold_what_queries_read(self) -> None:
        for tracked in self.running:
            self.check_context(tracked)

    def teardown(self) -> None:
        for tracked in self.running:
            self.kv.free(tracked.request)
        assert self.kv.num_pages_used == 0
        self.kv.check_integrity(set())
        assert self.kv.reset_prefix_cache()

    def compute(
        self, tracked: Tracked, num_tokens: int, *, num_steps: int = 1, may_fail: bool = False
    ) -> None:
        """Steps of one request: allocate, then write the tokens' contexts into its pages."""
        request = tracked.request
        findable = [group.cache.pages for group in self.kv._groups]
        for fresh in self.fresh:
            fresh.clear()
        tables = self.kv.allocate(request, num_tokens, num_steps)
        if tables is None:
            assert may_fail, "admitted without pages for its first chunk"
            return
        start = request.num_computed_tokens
        end = start + num_tokens
        for index, table in enumerate(tables):
            group = self.kv._groups[index]
            first = end - 1 if group.is_state and num_steps == 1 else start
            for position in self.completing(index, first, end):
                page = table[position // self.page_size]
                assert page != NULL_PAGE
                assert group.pool.num_refs(page) == 1, "a shared page is written"
                assert page not in findable[index] - self.fresh[index], "a full page is written"
                self.written[index][self.slot(index, page, position)] = context(tracked, position)
        request.num_computed_tokens = end

    def check_context(self, tracked: Tracked) -> None:
        """Every slot that the next query reads holds this request's own context."""
        request = tracked.request
        computed = request.num_computed_tokens
        tables = self.kv._held[request.request_id].page_tables
        for index, window in enumerate(self.group_windows()):
            first = 0 if window is None else max(0, computed - window + 1)
            for position in self.completing(index, first, computed):
                page = tables[index][position // self.page_size]
                assert page != NULL_PAGE
                assert self.written[index][self.slot(index, page, position)] == context(
                    tracked, position
                )

    def completing(self, index: int, first: int, end: int) -> list[int]:
        """Positions whose tokens complete an entry."""
        every = self.kv._groups[index].spec.spec.tokens_per_entry
        return [p for p in range(first, end) if (p + 1) % every == 0]

    def slot(self, index: int, page: int, position: int) -> tuple[int, int]:
        group = self.kv._groups[index]
        every = group.spec.spec.tokens_per_entry
        return page, 0 if group.is_state else position % self.page_size // every

    def longest_hit(self, request: Request) -> int:
        """By trying every boundary, longest first."""
        size = self.page_size
        chain = self.kv._hasher.start(request.cache_salt)
        self.kv._hasher.extend(chain, request.token_ids, request.num_tokens // size)
        for num_pages in range((request.num_tokens - 1) // size, 0, -1):
            boundary = num_pages * size
            if all(
                self.kv._groups[index].cache.lookup(chain[position // size + 1])
                for index, window in enumerate(self.group_windows())
                for position in range(
                    0 if window is None else max(0, boundary - window + 1), boundary
                )
            ):
                return boundary
        return 0

    def group_windows(self) -> list[int | None]:
        return [group.window for group in self.kv._groups]

    def is_window_only(self) -> bool:
        """A window of one token reads no page at all: any boundary is a hit."""
        return all(window == 1 for window in self.group_windows())


TestKVMachine = KVMachine.TestCase
TestKVMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
