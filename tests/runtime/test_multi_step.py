"""Several decode steps in one dispatch give the tokens that single steps give, bit for bit."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jengine.core.plan import StepPlan
from jengine.layers.param import abstract_parameters
from jengine.models.registry import resolve_architecture
from jengine.request import SamplingParams
from jengine.runtime.decode_steps import bytes_of_one_token, choose_max_decode_steps
from tests.oracles.arrivals import Arrival, arrivals
from tests.oracles.core_pump import CorePump
from tests.oracles.dummy_model import VOCAB_SIZE, write_dummy_model

MAX_STEPS = 6
STOPS = list(range(0, VOCAB_SIZE, 9))  # so many that most requests stop before their length
PARAMS = [
    SamplingParams(temperature=0, max_tokens=23, ignore_eos=True),
    SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.2, top_p=0.9, top_k=30, max_tokens=15, ignore_eos=True),
    SamplingParams(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=12,
                   ignore_eos=True),
    SamplingParams(temperature=0, frequency_penalty=1.0, logit_bias={7: 0.05}, max_tokens=25,
                   ignore_eos=True),
    SamplingParams(temperature=1.0, max_tokens=60, stop_token_ids=STOPS, ignore_eos=True),
    SamplingParams(temperature=1.0, min_tokens=5, max_tokens=30, stop_token_ids=STOPS),
    SamplingParams(temperature=0, bad_word_ids=[[5], [9, 11]], max_tokens=14, ignore_eos=True),
    SamplingParams(temperature=0, logprobs=2, max_tokens=9, ignore_eos=True),
]  # fmt: skip


class Pair:
    """The same model, run step by step and in dispatches of several steps."""

    def __init__(self, folder: Path) -> None:
        self.single = CorePump(folder, max_decode_steps=1)
        self.multi = CorePump(folder, max_decode_steps=MAX_STEPS)
        self.plans: list[StepPlan] = []  # those of `multi`
        dispatch = self.multi.core.runner.dispatch

        def record(plan: StepPlan):
            self.plans.append(plan)
            return dispatch(plan)

        self.multi.core.runner.dispatch = record  # type: ignore[method-assign]
        self._expected: dict[tuple, list[int]] = {}

    def expected(self, prompt: list[int], params: SamplingParams, seed: int) -> list[int]:
        key = (tuple(prompt), PARAMS.index(params), seed)
        if key not in self._expected:
            self._expected[key] = self.single.alone(prompt, params, seed=seed)
        return self._expected[key]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Tiny pools (preemptions), unused pages hold NaN, two KV groups."""
    folder = write_dummy_model(
        tmp_path_factory.mktemp("model"),
        architectures=["MinistralForCausalLM"],
        num_hidden_layers=3,
        sliding_window=24,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    )
    return Pair(folder)


@pytest.fixture(autouse=True)
def _clean(pair: Pair) -> Iterator[None]:
    yield
    for pump in (pair.single, pair.multi):
        pump.drain()
        assert pump.core.stats().num_pages_used == 0
        pump.messages.clear()
    pair.plans.clear()


ARRIVALS = arrivals(len(PARAMS), max_length=70, max_turns=9, max_size=6)


@given(ARRIVALS)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_tokens_equal_those_of_single_steps(pair: Pair, arrivals: list[Arrival]) -> None:
    """Random arrivals, stops in the middle, lengths, preemptions, prefix hits and aborts."""
    pump = pair.multi
    pump.messages.clear()
    expected = {
        f"r{i}": pair.expected(_tokens(a.prompt_seed, a.prompt_length), PARAMS[a.params], a.seed)
        for i, a in enumerate(arrivals)
    }
    for i, a in enumerate(arrivals):
        for _ in range(a.turns_before):
            pump.turn()
        prompt = _tokens(a.prompt_seed, a.prompt_length)
        pump.submit(f"r{i}", prompt, PARAMS[a.params], seed=a.seed)
    for i, a in enumerate(arrivals):
        if a.abort_after is not None:
            for _ in range(a.abort_after):
                pump.turn()
            pump.abort(f"r{i}")
    pump.drain()
    got, reasons = pump.tokens(), pump.finish_reasons()
    for request_id, tokens in expected.items():
        if reasons.get(request_id) == "abort":
            assert got[request_id] == tokens[: len(got[request_id])]
        else:
            assert got[request_id] == tokens, request_id
    assert pump.core.stats().num_pages_used == 0


def test_most_steps_of_a_lone_request_share_dispatches(pair: Pair) -> None:
    """33 tokens: one comes with the prompt, then dispatches of 6 steps, and a last one of 2."""
    before = pair.multi.core.stats().num_steps
    params = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True)
    pair.multi.submit("a", _tokens(0, 10), params)
    pair.multi.drain()
    assert [plan.num_steps for plan in pair.plans] == [1, 6, 6, 6, 6, 6, 2]
    assert [len(o.new_token_ids) for o in pair.multi.outputs()["a"]] == [1, 6, 6, 6, 6, 6, 2]
    assert pair.multi.core.stats().num_steps - before == 33
    assert pair.multi.tokens()["a"] == pair.single.alone(_tokens(0, 10), params)


def test_what_is_sampled_past_a_stop_is_dropped(pair: Pair) -> None:
    """Every place of the stop in a dispatch, greedy and penalised neighbours included."""
    plain = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    tokens = pair.single.alone(_tokens(1, 12), plain, seed=3)
    cuts = set()
    for i, token in enumerate(tokens[:14]):
        if token in tokens[:i]:
            continue
        params = plain.clone(stop_token_ids=[token])
        pair.multi.submit(f"s{i}", _tokens(1, 12), params, seed=3)
        pair.multi.submit(f"n{i}", _tokens(2, 9), PARAMS[0])
        pair.multi.drain()
        assert pair.multi.tokens()[f"s{i}"] == tokens[: i + 1]
        assert pair.multi.outputs()[f"s{i}"][-1].stop_reason == token
        assert pair.multi.tokens()[f"n{i}"] == pair.expected(_tokens(2, 9), PARAMS[0], 0)
        cuts.add(len(pair.multi.outputs()[f"s{i}"][-1].new_token_ids))
    assert cuts >= {1, 2, 3, 4, 5, 6}


def test_dispatches_of_several_steps_preempt_nobody_but_go_on_beside_preemptions(
    pair: Pair,
) -> None:
    """Four requests whose pages do not fit at their ends: 12 pages each, 23 in all."""
    params = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True)
    before = pair.multi.core.stats().num_preemptions
    for i in range(4):
        pair.multi.submit(f"p{i}", _tokens(i, 36), params, seed=i)
    pair.multi.drain()
    got = pair.multi.tokens()
    assert pair.multi.core.stats().num_preemptions > before
    assert sum(plan.num_steps > 1 for plan in pair.plans) > 5
    for i in range(4):
        assert got[f"p{i}"] == pair.single.alone(_tokens(i, 36), params, seed=i)


def test_logits_that_are_not_finite_end_a_request_where_single_steps_end_it(pair: Pair) -> None:
    """The embedding of a token that is sampled in the middle of a dispatch is NaN."""
    prompt = _tokens(4, 20)
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    tokens = pair.single.alone(prompt, params, seed=5)
    place = next(i for i in range(8, 12) if tokens[i] not in [*prompt, *tokens[:i]])
    for pump in (pair.single, pair.multi):
        runner = pump.core.runner
        index, good = runner.param_paths.index("embed_tokens.weight"), runner.leaves
        broken = good[index].at[tokens[place]].set(np.nan)
        runner.leaves = (*good[:index], broken, *good[index + 1 :])
        pump.submit("bad", prompt, params, seed=5)
        try:
            pump.drain()
        finally:
            runner.leaves = good
        pump.core.scheduler.reset_prefix_cache()
        assert pump.finish_reasons()["bad"] == "error"
        assert pump.tokens()["bad"] == tokens[: place + 1]
    assert len(pair.multi.outputs()["bad"]) == 3  # the prompt's token, six, and the rest


def test_a_request_that_nobody_reads_step_by_step_is_told_of_once(pair: Pair) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    for pump in (pair.single, pair.multi):
        pump.submit("quiet", _tokens(1, 12), params, seed=3, is_streamed=False)
        pump.submit("aborted", _tokens(1, 12), params, seed=4, is_streamed=False)
        # Log-probabilities come with their tokens, whatever was asked.
        scored = params.clone(logprobs=1, max_tokens=4)
        pump.submit("scored", _tokens(1, 12), scored, seed=3, is_streamed=False)
        for _ in range(7):
            pump.turn()
        pump.abort("aborted")
        pump.drain()
        (output,) = pump.outputs()["quiet"]
        (aborted,) = pump.outputs()["aborted"]
        assert len(output.new_token_ids) == 20
        assert output.first_token_time is not None
        assert 0 < len(aborted.new_token_ids) < 20
        assert len(pump.outputs()["scored"]) == 4
        assert output.new_token_ids[:4] == pump.tokens()["scored"]
    assert pair.multi.tokens()["quiet"] == pair.single.alone(_tokens(1, 12), params, seed=3)


def test_same_executables_nothing_compiles_and_nothing_is_copied(pair: Pair) -> None:
    single, multi = (pump.core.runner for pump in (pair.single, pair.multi))
    assert multi.programs.ready.keys() == single.programs.ready.keys()
    assert multi.programs.num_late == 0
    state_bytes = sum(x.nbytes for x in jax.tree.leaves((multi.kv, multi.rows)))
    page_shape = ",".join(map(str, multi.kv[0].shape))
    num_loops = 0
    for bucket in multi.buckets:
        compiled = multi.programs.ready[str(bucket)]
        analysis, text = compiled.memory_analysis(), compiled.as_text()
        assert analysis is not None and text is not None
        assert analysis.alias_size_in_bytes >= state_bytes
        assert not [
            line for line in text.splitlines() if f"f32[{page_shape}]" in line and " copy(" in line
        ]
        num_loops += bucket.is_decode
        has_token_loop = f"s32[2,{MAX_STEPS},{bucket.num_seqs}]" in text
        assert has_token_loop == bucket.is_decode
        assert f"s32[2,{MAX_STEPS}," not in (single.programs.ready[str(bucket)].as_text() or "")
    assert num_loops > 1


@pytest.mark.parametrize(
    ("platform", "num_bytes", "expected"),
    [
        ("cpu", 10**6, 1),
        ("gpu", 16 * 10**9, 1),  # Llama 8B in bfloat16: 5.3 ms a step
        ("gpu", 8 * 10**9, 2),
        ("gpu", 6 * 10**9, 4),  # 2 ms
        ("gpu", 12 * 10**8, 8),  # Qwen3 0.6B: 0.4 ms
        ("gpu", 0, 8),
        ("gpu", 10**12, 1),
    ],
)
def test_a_dispatch_stays_short(platform: str, num_bytes: int, expected: int) -> None:
    assert choose_max_decode_steps(platform, num_bytes) == expected


def test_experts_count_as_far_as_one_token_reads_them() -> None:
    hf = {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100,
        "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 16,
        "num_experts_per_tok": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "mlp_only_layers": [1],
    }  # fmt: skip
    _, model_class = resolve_architecture(hf)
    cfg = model_class.config_class.from_hf(
        hf, dtype="bfloat16", kv_dtype="bfloat16", max_model_len=256
    )
    attention = (4 + 2 * 2) * 16 * 64 + 4 * 16 * 64 + 2 * 16
    norms = 2 * 64
    sparse = 16 * 64 + 4 * 3 * 32 * 64  # router, and 4 experts
    dense = 3 * 96 * 64
    numbers = 3 * (attention + norms) + 2 * sparse + dense + 100 * 64 + 64
    parameters = abstract_parameters(model_class(cfg)).values()
    assert bytes_of_one_token(parameters, cfg) == 2 * numbers


def _tokens(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, 200)[:length].tolist()
