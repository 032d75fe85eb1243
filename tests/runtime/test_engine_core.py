"""The engine's promises on a tiny model: same tokens as one request at a time, nothing compiles,
nothing is copied.
"""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jengine.protocol import LogprobsData
from jengine.request import SamplingParams
from tests.oracles.arrivals import Arrival, arrivals
from tests.oracles.core_pump import CorePump
from tests.oracles.dummy_model import VOCAB_SIZE, write_dummy_model


@pytest.fixture(scope="module")
def pump(tmp_path_factory: pytest.TempPathFactory) -> CorePump:
    """Tiny pool (preemptions), unused pages hold NaN, two KV groups."""
    folder = write_dummy_model(
        tmp_path_factory.mktemp("model"),
        architectures=["MinistralForCausalLM"],
        num_hidden_layers=3,
        sliding_window=24,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    )
    return CorePump(folder, max_logprobs=-1)


PARAMS = [
    SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1.2, top_p=0.9, top_k=30, max_tokens=15, ignore_eos=True),
    SamplingParams(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=12,
                   ignore_eos=True),
    SamplingParams(temperature=0, frequency_penalty=1.0, logit_bias={7: 0.05}, max_tokens=25,
                   ignore_eos=True),
    SamplingParams(temperature=1.0, min_tokens=5, max_tokens=30),
    SamplingParams(temperature=0, bad_word_ids=[[5], [9, 11]], max_tokens=14, ignore_eos=True),
]  # fmt: skip


ARRIVALS = arrivals(len(PARAMS), max_length=90, max_turns=4, max_size=7)
_alone: dict[Arrival, list[int]] = {}


@given(ARRIVALS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_engine_equals_one_request_at_a_time(pump: CorePump, arrivals: list[Arrival]) -> None:
    """Random arrivals, chunks, prefix hits, preemptions and aborts change no token."""
    expected = {}
    for a in arrivals:
        key = dataclasses.replace(a, turns_before=0, abort_after=None)
        if key not in _alone:
            _alone[key] = pump.alone(_prompt(a), PARAMS[a.params], seed=a.seed)
        expected[a] = _alone[key]
    pump.messages.clear()
    ids = {f"r{i}": a for i, a in enumerate(arrivals)}
    doomed: list[tuple[str, int]] = []
    for request_id, a in ids.items():
        for _ in range(a.turns_before):
            pump.turn()
        pump.submit(request_id, _prompt(a), PARAMS[a.params], seed=a.seed)
        if a.abort_after is not None:
            doomed.append((request_id, a.abort_after))
    for request_id, turns in sorted(doomed, key=lambda pair: pair[1]):
        for _ in range(turns):
            pump.turn()
        pump.abort(request_id)
    pump.drain()
    got, reasons = pump.tokens(), pump.finish_reasons()
    for request_id, a in ids.items():
        tokens = got.get(request_id, [])
        if reasons.get(request_id) == "abort":
            assert tokens == expected[a][: len(tokens)]
        else:
            assert tokens == expected[a], request_id
    assert pump.core.stats().num_pages_used == 0


def test_preemption_and_prefix_hits_did_happen(pump: CorePump) -> None:
    """The property above means something only if the paths are taken."""
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    before = pump.core.stats()
    for i in range(4):
        pump.submit(f"p{i}", _tokens(i, 40), long)
    pump.drain()
    for i in range(2):
        pump.submit(f"again{i}", _tokens(3, 40), long.clone(max_tokens=2))
        pump.drain()
    after = pump.core.stats()
    assert after.num_preemptions > before.num_preemptions
    assert after.prefix_hits > before.prefix_hits
    pump.messages.clear()


def test_nothing_compiles_after_warm_up(pump: CorePump) -> None:
    """Every bucket, feature and batch size after start: no compilation at all in the process."""
    events: list[str] = []
    pump.drain()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **kwargs: (
            events.append(event) if "backend_compile" in event else None
        )
    )
    try:
        for count in (1, 2, 3, 4):
            for length in (1, 5, 30, 70):
                for i in range(count):
                    params = PARAMS[(count + length + i) % len(PARAMS)].clone(
                        logprobs=i, max_tokens=5
                    )
                    pump.submit(f"{count}-{length}-{i}", _tokens(i, length), params)
                pump.drain()
        scored = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3, logprobs=-1)
        pump.submit("scored", _tokens(1, 50), scored)
        pump.drain()
        assert events == []
        assert pump.core.stats().num_compilations == 0
        jax.jit(lambda x: x * 3 + 1)(np.ones(7))  # the listener does see compilations
        assert events
    finally:
        jax.monitoring.clear_event_listeners()
    pump.messages.clear()


def test_kv_is_aliased_in_place(pump: CorePump) -> None:
    """Every bucket updates all KV bytes and the row state where they lie, and holds no second copy
    of them.
    """
    runner = pump.core.runner
    kv_bytes = sum(x.nbytes for x in runner.kv)
    row_bytes = sum(x.nbytes for x in jax.tree.leaves(runner.rows))
    for bucket in runner.buckets:
        compiled = runner.programs.ready[str(bucket)]
        analysis, text = compiled.memory_analysis(), compiled.as_text()
        assert analysis is not None and text is not None
        assert analysis.alias_size_in_bytes >= kv_bytes + row_bytes
        page_shape = ",".join(map(str, runner.kv[0].shape))
        copies = [
            line for line in text.splitlines()
            if f"f32[{page_shape}]" in line and (" copy(" in line or "copy-start" in line)
        ]  # fmt: skip
        assert not copies, copies


def test_named_tokens_have_the_logprobs_of_the_whole_vocabulary(pump: CorePump) -> None:
    """Among companions, in a prompt of several chunks, in more than one call of the scorer."""
    named = {"few": [7, 2, VOCAB_SIZE - 1], "many": list(range(1, VOCAB_SIZE, 5))[:128]}
    base = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def entries(**fields: list[int] | int) -> dict[str, list[LogprobsData]]:
        pump.submit("companion", _tokens(4, 40), PARAMS[3].clone(logprobs=1))
        for i, (name, ids) in enumerate(named.items()):
            params = base.clone(**(fields or {"logprob_token_ids": ids}))
            pump.submit(name, _tokens(i, 45), params)
        pump.drain()
        outputs = pump.outputs()
        pump.messages.clear()
        return {name: [e for o in outputs[name] for e in o.logprobs or []] for name in named}

    got, whole = entries(), entries(logprobs=-1)
    for name, ids in named.items():
        assert len(got[name]) == 4
        for entry, everything in zip(got[name], whole[name], strict=True):
            assert entry.token_ids == [everything.token_ids[0], *ids]
            assert (entry.logprobs[0], entry.rank) == (everything.logprobs[0], everything.rank)
            best = dict(zip(everything.token_ids[1:], everything.logprobs[1:], strict=True))
            expected = np.array([best[i] for i in ids])
            # float32, summed over the vocabulary, against the same logits in float64
            limit = np.finfo(np.float32).eps * VOCAB_SIZE**0.5 * np.abs(expected).max()
            np.testing.assert_allclose(entry.logprobs[1:], expected, rtol=0, atol=limit)
            order = list(best)
            assert entry.ranks == [order.index(i) + 1 for i in ids]


def test_a_thinking_budget_forces_the_end_and_nothing_else(pump: CorePump) -> None:
    """Before and behind the end marker stands what the model says anyway; companions go on as they
    are alone."""
    budget, markers = 5, [[7], [9, 11]]
    free = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    bound = free.clone(thinking_token_budget=budget, thinking_markers=markers)
    prompt, closed = [*_tokens(3, 37), 7, 30], [*_tokens(3, 37), 7, 30, 9, 11]
    expected = pump.alone(prompt, free)[: budget - 1]  # the prompt's 30 counts
    expected += markers[1]
    expected += pump.alone(prompt + expected, free.clone(max_tokens=12 - len(expected)))
    companion = pump.alone(_tokens(4, 40), PARAMS[2], seed=5)
    pump.messages.clear()
    pump.submit("bound", prompt, bound)
    pump.submit("closed", closed, bound)
    pump.submit("companion", _tokens(4, 40), PARAMS[2], seed=5)
    pump.drain()
    tokens = pump.tokens()
    pump.messages.clear()
    assert tokens["bound"] == expected
    assert tokens["closed"] == pump.alone(closed, free)
    assert tokens["companion"] == companion
    pump.messages.clear()


def test_prompt_and_sampled_logprobs_match_a_teacher_forced_pass(pump: CorePump) -> None:
    runner = pump.core.runner
    prompt = _tokens(9, 70)
    params = SamplingParams(
        temperature=0, max_tokens=6, logprobs=4, prompt_logprobs=-1, ignore_eos=True
    )
    pump.submit("lp", prompt, params)
    pump.drain()
    outputs = pump.outputs()["lp"]
    tokens = pump.tokens()["lp"]
    hidden = np.asarray(runner.hidden_states(prompt + tokens)).astype(np.float64)
    logits = hidden @ np.asarray(runner.model.head).astype(np.float64).T
    exact = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    entries = [e for o in outputs for e in (o.prompt_logprobs or [])]
    assert len(entries) == len(prompt) - 1
    for position, entry in enumerate(entries, start=1):
        assert entry.token_ids[0] == prompt[position]
        row = exact[position - 1]
        np.testing.assert_allclose(entry.logprobs, row[entry.token_ids], atol=1e-4)
        assert len(entry.token_ids) == 1 + VOCAB_SIZE
        assert entry.rank == 1 + int((row > row[prompt[position]]).sum())
    sampled = [e for o in outputs for e in (o.logprobs or [])]
    assert len(sampled) == len(tokens)
    for i, entry in enumerate(sampled):
        row = exact[len(prompt) - 1 + i]
        assert entry.token_ids[0] == tokens[i] and len(entry.token_ids) == 5
        np.testing.assert_allclose(entry.logprobs, row[entry.token_ids], atol=1e-4)
        assert entry.token_ids[1:] == np.argsort(-row)[:4].tolist()
    pump.messages.clear()


def test_nan_in_one_request_ends_that_request_only(pump: CorePump) -> None:
    """A parameter row of NaN reached by one token: the request that uses it fails, its neighbour
    does not notice.
    """
    runner = pump.core.runner
    pump.drain()
    pump.core.scheduler.reset_prefix_cache()
    index = runner.param_paths.index("embed_tokens.weight")
    good = runner.leaves
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, bad_word_ids=[[77]])
    expected = pump.alone(_tokens(1, 20), params)
    assert 77 not in _tokens(1, 20)
    broken = good[index].at[77].set(np.nan)
    runner.leaves = (*good[:index], broken, *good[index + 1 :])
    try:
        pump.submit("good", _tokens(1, 20), params)
        pump.submit("bad", [5, 77, 9], params)
        pump.drain()
    finally:
        runner.leaves = good
    assert pump.tokens()["good"] == expected
    assert pump.finish_reasons()["bad"] == "error"
    assert "finite" in (pump.outputs()["bad"][-1].error or "")
    pump.core.scheduler.reset_prefix_cache()
    pump.messages.clear()


def _tokens(seed: int, length: int) -> list[int]:
    ids = np.random.default_rng(seed).integers(3, VOCAB_SIZE, 200)
    return np.where(ids == 77, 78, ids)[:length].tolist()


def _prompt(a: Arrival) -> list[int]:
    return _tokens(a.prompt_seed, a.prompt_length)
