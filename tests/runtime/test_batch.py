"""Plans packed into one array, against a field by field account of each sequence; and back."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jengine.core.plan import ScheduledRequest, StepPlan
from jengine.layers.sampling import RowState
from jengine.request import Request, SamplingParams
from jengine.runtime.batch import PENDING, BatchLayout, HostBatch, build_batch, unpack_batch
from jengine.runtime.results import read_sampled
from jengine.runtime.row_mirror import RowMirror
from jengine.runtime.step import set_pages

PAGES_PER_SEQ, NUM_ROWS, VOCAB = 12, 6, 50
PAGE_SIZE = 4
SAMPLINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.5, top_k=5, top_p=0.8, min_p=0.1),
    SamplingParams(temperature=0, top_k=3, top_p=0.5),  # greedy: the rest has no effect
    SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=-1, repetition_penalty=2),
    SamplingParams(temperature=1.0, logit_bias={3: 1.0}),
    SamplingParams(temperature=0, min_tokens=4, stop_token_ids=[7]),
    SamplingParams(temperature=0, bad_word_ids=[[9], [1, 8]]),
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=0, prompt_logprobs=2),
]


def layout(num_tokens: int, num_seqs: int, max_steps: int = 1) -> BatchLayout:
    return BatchLayout(num_tokens, num_seqs, 2, PAGES_PER_SEQ, NUM_ROWS, VOCAB, max_steps)


def item(
    row: int,
    start: int,
    num_tokens: int,
    sampling: SamplingParams,
    *,
    num_known: int,
    num_prompt: int = 5,
    samples: bool = True,
    is_admitted: bool = False,
) -> ScheduledRequest:
    """A request whose token i is 10 * row + i % 7, with pages 100 * row + i (+ 50 in group 1)."""
    prompt = [10 * row + i % 7 for i in range(num_prompt)]
    request = Request(str(row), prompt, sampling, frozenset({2}), seed=(row << 40) + 3)
    request.token_ids = [10 * row + i % 7 for i in range(num_known)]
    num_pages = -(-(start + num_tokens) // PAGE_SIZE)
    pages = [100 * row + 1 + i for i in range(num_pages)]
    tables = (pages, [page + 50 for page in pages])
    return ScheduledRequest(request, row, start, num_tokens, tables, samples, is_admitted)


def fields(packed: np.ndarray, of: BatchLayout) -> dict[str, Any]:
    masks = jnp.zeros(of.mask_shape, jnp.int32)
    batch = unpack_batch(jnp.asarray(packed), masks, of)
    flat = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    sampling = flat.pop("sampling")
    flat |= {f"sampling.{f.name}": getattr(sampling, f.name) for f in dataclasses.fields(sampling)}
    return {name: np.asarray(value) for name, value in flat.items()}


def expected_fields(plan: StepPlan, of: BatchLayout) -> dict[str, Any]:
    """One sequence after the other, as the fields are described in `DeviceBatch`."""
    T, S = of.num_tokens, of.num_seqs
    e: dict[str, Any] = {
        "token_ids": [], "positions": [], "seq_ids": [], "cu_q_lens": [0], "kv_lens": [],
        "last_token_index": [], "samples": [], "sampling.rows": [],
    }  # fmt: skip
    for s, x in enumerate(plan.scheduled):
        count = 1 if plan.num_steps > 1 else x.num_tokens
        for position in range(x.start, x.start + count):
            known = x.request.token_ids
            e["token_ids"].append(known[position] if position < len(known) else PENDING)
            e["positions"].append(position)
            e["seq_ids"].append(s)
        e["cu_q_lens"].append(len(e["token_ids"]))
        e["kv_lens"].append(x.start + count)
        e["last_token_index"].append(len(e["token_ids"]) - 1)
        e["samples"].append(x.samples)
        e["sampling.rows"].append(x.row)
    num_tokens, num_seqs = len(e["token_ids"]), len(plan.scheduled)
    e["sampling.positions"] = list(e["kv_lens"])
    padding = {"sampling.rows": NUM_ROWS, "cu_q_lens": num_tokens}
    for name, values in e.items():
        size = {"token_ids": T, "positions": T, "seq_ids": T, "cu_q_lens": S + 1}.get(name, S)
        values += [padding.get(name, 0)] * (size - len(values))
    return e | {"num_tokens": num_tokens, "num_seqs": num_seqs, "num_steps": plan.num_steps}


def build(plan: StepPlan, of: BatchLayout) -> HostBatch:
    mirror = RowMirror(of.num_groups, NUM_ROWS, PAGES_PER_SEQ)
    for x in plan.scheduled:
        mirror.admit(_as_admitted(x))
    return build_batch(plan, of, mirror)


def _as_admitted(x: ScheduledRequest) -> ScheduledRequest:
    """As if it had been admitted with the tokens before it in the cache."""
    num_pages = -(-x.start // PAGE_SIZE)
    tables = tuple(pages[:num_pages] for pages in x.page_tables)
    return ScheduledRequest(x.request, x.row, x.start, 0, tables, x.samples, True)


MIXED = (
    item(4, 0, 6, SAMPLINGS[0], num_known=9, samples=False, num_prompt=9),  # a chunk
    item(1, 7, 1, SAMPLINGS[1], num_known=8),  # decode, token known
    item(5, 9, 1, SAMPLINGS[2], num_known=9),  # decode, token on the device
    item(0, 3, 4, SAMPLINGS[3], num_known=6),  # recompute, newest token on the device
)
DECODES = tuple(
    item(row, 6 + row, 1, SAMPLINGS[row], num_known=6 + row + row % 2) for row in range(5)
)
MANY_STEPS = tuple(item(row, 6 + row, 3, SAMPLINGS[row], num_known=7 + row) for row in range(4))


@pytest.mark.parametrize(
    ("plan", "of"),
    [
        (StepPlan(0, MIXED, 12), layout(16, 6)),
        (StepPlan(0, MIXED, 12), layout(12, 4)),
        (StepPlan(0, DECODES, 5), layout(8, 8)),
        (StepPlan(0, DECODES, 5), layout(5, 5, max_steps=4)),
        (StepPlan(0, MANY_STEPS, 12, num_steps=3), layout(4, 4, max_steps=4)),
        (StepPlan(0, MANY_STEPS[:1], 3, num_steps=3), layout(8, 8, max_steps=3)),
    ],
)
def test_every_field(plan: StepPlan, of: BatchLayout) -> None:
    got = fields(build(plan, of).packed, of)
    for name, value in expected_fields(plan, of).items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("number", range(len(SAMPLINGS)))
def test_sampling_parameters_reach_their_row(number: int) -> None:
    p = SAMPLINGS[number]
    neighbour = item(0, 8, 1, SAMPLINGS[0], num_known=9)
    tested = item(3, 8, 1, p, num_known=9, num_prompt=5)
    of = layout(4, 4)
    batch = build(StepPlan(0, (neighbour, tested), 2), of)
    got = {k.removeprefix("sampling."): v for k, v in fields(batch.packed, of).items()}
    greedy = p.temperature == 0
    adjusted = number in (4, 5)
    row = {
        "temperature": p.temperature,
        "top_k": 0 if greedy else p.top_k,
        "top_p": 1.0 if greedy else p.top_p,
        "min_p": 0.0 if greedy else p.min_p,
        "presence": p.presence_penalty,
        "frequency": p.frequency_penalty,
        "repetition": p.repetition_penalty,
        "adjusted_rows": 3 if adjusted else NUM_ROWS,
    }
    for name, value in row.items():
        assert got[name][1] == pytest.approx(value), name
        neutral = {"top_p": 1.0, "repetition": 1.0, "adjusted_rows": NUM_ROWS}.get(name, 0.0)
        assert got[name][[0, 2, 3]].tolist() == [neutral] * 3, name
    assert got["seeds"][1].tolist() == [3, 3 << 8]
    # Outputs so far: 4 tokens, of which the newest two are 3 * 10 + 7 % 7 and 3 * 10 + 1.
    banned = sorted(t for t in got["banned"][1].tolist() if t != VOCAB)
    assert banned == {7: [9]}.get(number, [])
    assert (got["banned"][[0, 2, 3]] == VOCAB).all()
    assert bool(got["any_special"]) == (not greedy or adjusted or bool(banned))
    assert bool(got["any_adjusted"]) == (adjusted or bool(banned))
    assert bool(got["any_truncated"]) == (number == 2)
    assert bool(got["any_logprobs"]) == batch.has_logprobs == (number == 8)
    assert batch.has_prompt_logprobs == (number == 9)


def test_stops_are_banned_before_min_tokens_also_in_a_plan_of_several_steps() -> None:
    """4 tokens at least, prompt of 5: the outputs at 5 and 6 are there, 7 and 8 are sampled."""
    tested = item(2, 6, 2, SAMPLINGS[6], num_known=7)
    of = layout(2, 2, max_steps=2)
    got = fields(build(StepPlan(0, (tested,), 2, num_steps=2), of).packed, of)
    assert sorted(t for t in got["sampling.banned"][0].tolist() if t != VOCAB) == [2, 7]
    assert got["sampling.any_special"] and got["sampling.any_adjusted"]
    late = item(2, 8, 2, SAMPLINGS[6], num_known=9)
    got = fields(build(StepPlan(0, (late,), 2, num_steps=2), of).packed, of)
    assert (got["sampling.banned"] == VOCAB).all() and not got["sampling.any_special"]


def test_a_chunk_before_the_prompts_end_asks_for_no_sampling() -> None:
    chunk = item(2, 0, 3, SAMPLINGS[2], num_known=5, samples=False)
    plain = item(1, 8, 1, SAMPLINGS[0], num_known=9)
    of = layout(4, 2)
    got = fields(build(StepPlan(0, (chunk, plain), 4), of).packed, of)
    assert not got["sampling.any_special"] and not got["sampling.any_truncated"]


class Tables:
    """Page tables on the device, as `ModelRunner` and the step keep them."""

    def __init__(self) -> None:
        tables = tuple(jnp.full((NUM_ROWS, PAGES_PER_SEQ), -7, jnp.int32) for _ in range(2))
        empty = jnp.zeros((NUM_ROWS, 1))
        self.rows = RowState(jnp.zeros(NUM_ROWS, jnp.int32), empty, empty, empty, tables)
        self.mirror = RowMirror(2, NUM_ROWS, PAGES_PER_SEQ)
        self.num_apart = 0

    def run(self, of: BatchLayout, *scheduled: ScheduledRequest) -> None:
        for x in scheduled:
            if x.is_admitted and (tables := self.mirror.admit(x)) is not None:
                self.num_apart += 1
                self.rows = set_pages(self.rows, jnp.int32(x.row), jnp.asarray(tables))
        plan = StepPlan(0, scheduled, sum(x.num_tokens for x in scheduled))
        got = fields(build_batch(plan, of, self.mirror).packed, of)
        tables = [np.array(table) for table in self.rows.page_tables]
        for group, table in enumerate(tables):
            slots = got["page_slots"][group].tolist()
            assert len(set(slots)) == len(slots)
            for slot, page in zip(slots, got["page_ids"][group].tolist(), strict=True):
                if slot < table.size:
                    table.reshape(-1)[slot] = page
        self.rows = dataclasses.replace(self.rows, page_tables=tuple(map(jnp.asarray, tables)))
        for x in scheduled:
            for group, pages in enumerate(x.page_tables):
                held = np.asarray(self.rows.page_tables[group][x.row, : len(pages)])
                assert held.tolist() == list(pages)


def test_page_tables_on_the_device_follow_those_of_the_scheduler() -> None:
    plain, tables = SAMPLINGS[0], Tables()
    tables.run(layout(8, 4), item(2, 0, 7, plain, num_known=7, is_admitted=True))
    tables.run(layout(1, 1), item(2, 7, 1, plain, num_known=7))  # the same pages
    tables.run(layout(2, 2), item(2, 8, 1, plain, num_known=9))  # one more
    assert tables.num_apart == 0
    # A hit of 7 pages and one token to compute: more than the bucket has room for.
    other = item(3, 28, 1, plain, num_known=29, is_admitted=True)
    tables.run(layout(2, 2), other, item(2, 9, 1, plain, num_known=9))
    assert tables.num_apart == 1
    assert tables.rows.page_tables[0][3, 8:].tolist() == [0] * 4
    # The row's next owner, with fewer pages than the last.
    tables.run(layout(4, 4), item(3, 0, 4, plain, num_known=4, is_admitted=True))
    tables.run(layout(4, 4), item(3, 4, 1, plain, num_known=5))


def test_sampled_ids_end_before_logits_that_are_not_finite() -> None:
    sampled = np.zeros((2, 4, 8), np.int32)
    sampled[0] = np.arange(32).reshape(4, 8)
    sampled[1, :3, :4] = 1
    sampled[1, 1:, 2] = 0  # the third request fails in its second step
    plan = StepPlan(0, MANY_STEPS, 12, num_steps=3)
    ids, failed = read_sampled(sampled, plan)
    assert ids == [[0, 8, 16], [1, 9, 17], [2], [3, 11, 19]]
    assert failed == {2}


def test_a_chunk_has_no_logits_that_could_fail() -> None:
    sampled = np.ones((2, 1, 4), np.int32)
    sampled[1, 0, :2] = 0
    _, failed = read_sampled(sampled, StepPlan(0, MIXED, 12))
    assert failed == {1}
