"""A deterministic stand-in for the device: a "model" whose only memory is the pages.

Each layer of the model writes one value per token into its group's pages and reads all values that
the token may attend to back through the page table. As on the real device, a layer writes the
values of every token in the step before any of them reads, and steps run in dispatch order. Values
of the second layer and above depend on the whole visible prefix, so a page that belongs to another
prefix, was overwritten too early, or was never written changes the tokens (or raises KeyError).

A layer with several tokens an entry writes for the last of them only, and a token reads every
entry that is complete by then. A layer of states folds its tokens into one value, which it reads
where the token before the step left it. All states of a step are read before any is written.
"""

from collections.abc import Sequence

from msgspec import structs

from jengine.core.page_pool import NULL_PAGE
from jengine.core.plan import ScheduledRequest, StepPlan, StepResult
from jengine.kv_spec import KVGroup
from tests.core.factories import Every, Window

VOCAB = 29


def mix(*values: object) -> int:
    return hash(values) & (2**61 - 1)  # hashes of ints and tuples do not vary between processes


def naive_tokens(windows: Sequence[Window], prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What the model generates for one request alone, from plain lists: no pages, no steps."""
    tokens = list(prompt)
    values: list[list[int]] = [[] for _ in windows]
    for position in range(len(prompt) + num_tokens - 1):
        hidden = mix(tokens[position])
        for window, layer in zip(windows, values, strict=True):
            if window == "state":
                layer[:] = [mix(*layer, hidden, position)]
                hidden = mix(hidden, *layer)
                continue
            if isinstance(window, Every):
                if (position + 1) % window.num_tokens == 0:
                    layer.append(mix(hidden, position))
                hidden = mix(hidden, *layer)
                continue
            layer.append(mix(hidden, position))
            hidden = mix(hidden, *layer[_first_read(position, window) :])
        if position + 1 >= len(prompt):
            tokens.append(hidden % VOCAB)
    return tokens[len(prompt) :]


class FakeDevice:
    """`layers` holds one group index for each layer."""

    def __init__(self, groups: Sequence[KVGroup]) -> None:
        self._layers = sorted(
            (layer, g) for g, group in enumerate(groups) for layer in group.layers
        )
        self._groups = groups
        self._page_size = groups[0].page_size
        self._memory: dict[tuple[int, int, int], int] = {}  # (layer, page, offset) -> value
        self._last_token: dict[int, int] = {}  # row -> newest token sampled for it

    def dispatch(self, plan: StepPlan) -> StepResult:
        if plan.num_steps == 1:
            return StepResult(self._step(plan.scheduled))
        steps = [
            self._step(
                [structs.replace(e, start=e.start + i, num_tokens=1) for e in plan.scheduled]
            )
            for i in range(plan.num_steps)
        ]
        return StepResult([[ids[0] for ids in of_entry] for of_entry in zip(*steps, strict=True)])

    def _step(self, scheduled: Sequence[ScheduledRequest]) -> list[list[int]]:
        hidden = [[mix(token) for token in self._tokens(entry)] for entry in scheduled]
        for layer, group in self._layers:
            if self._groups[group].spec.is_state:
                hidden = self._fold(scheduled, layer, group, hidden)
                continue
            for entry, values in zip(scheduled, hidden, strict=True):
                for i, value in enumerate(values):
                    position = entry.start + i
                    if (position + 1) % self._groups[group].spec.tokens_per_entry == 0:
                        slot = self._slot(entry, layer, group, position)
                        self._memory[slot] = mix(value, position)
            hidden = [
                [
                    mix(value, *self._read(entry, layer, group, entry.start + i))
                    for i, value in enumerate(values)
                ]
                for entry, values in zip(scheduled, hidden, strict=True)
            ]
        sampled = []
        for entry, values in zip(scheduled, hidden, strict=True):
            token = values[-1] % VOCAB if entry.samples else -1
            if entry.samples:
                self._last_token[entry.row] = token
            sampled.append([token])
        return sampled

    def _fold(
        self,
        scheduled: Sequence[ScheduledRequest],
        layer: int,
        group: int,
        hidden: list[list[int]],
    ) -> list[list[int]]:
        """Through a layer of states."""
        states = [
            [self._memory[self._state(e, layer, group, e.start)]] if e.start else []
            for e in scheduled
        ]
        folded = []
        for entry, state, values in zip(scheduled, states, hidden, strict=True):
            row = []
            for i, value in enumerate(values):
                state = [mix(*state, value, entry.start + i)]
                row.append(mix(value, *state))
            end = entry.start + entry.num_tokens
            self._memory[self._state(entry, layer, group, end)] = state[0]
            folded.append(row)
        return folded

    def _state(
        self, entry: ScheduledRequest, layer: int, group: int, end: int
    ) -> tuple[int, int, int]:
        """Where the state after the first `end` tokens lies."""
        page = entry.page_tables[group][(end - 1) // self._page_size]
        assert page != NULL_PAGE, "the null state is read or written"
        return layer, page, 0

    def _tokens(self, entry: ScheduledRequest) -> list[int]:
        if entry.is_admitted:
            self._last_token.pop(entry.row, None)
        known = entry.request.token_ids[entry.start : entry.start + entry.num_tokens]
        if len(known) < entry.num_tokens:
            known.append(self._last_token[entry.row])
        assert len(known) == entry.num_tokens, "only the newest token can be on the device"
        return known

    def _read(self, entry: ScheduledRequest, layer: int, group: int, position: int) -> list[int]:
        spec = self._groups[group].spec
        first, every = _first_read(position, spec.window), spec.tokens_per_entry
        return [
            self._memory[self._slot(entry, layer, group, p)]
            for p in range(first, position + 1)
            if (p + 1) % every == 0
        ]

    def _slot(
        self, entry: ScheduledRequest, layer: int, group: int, position: int
    ) -> tuple[int, int, int]:
        index, offset = divmod(position, self._page_size)
        page = entry.page_tables[group][index]
        assert page != NULL_PAGE, "the null page is read or written"
        return layer, page, offset // self._groups[group].spec.tokens_per_entry


def _first_read(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)
