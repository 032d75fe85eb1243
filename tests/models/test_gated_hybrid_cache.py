"""Qwen3.5 through the engine: whatever is cut, shared, preempted, aborted or planned ahead, each
request gets the tokens that transformers gives it alone. Unused pages and states hold NaN.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jengine.request import Request, SamplingParams
from tests.oracles.core_pump import CorePump
from tests.oracles.driver import Driver
from tests.oracles.tiny_llama import make_tiny_llama

torch = pytest.importorskip("torch")

PAGE = 8
PROMPT = [3 + (7 * i) % 500 for i in range(100)]
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
LENGTHS = (1, 2, 30, 31, 32, 29, 8, 17, 64, 65, 100)
Greedy = Callable[[list[int]], list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Greedy]:
    """(the checkpoint, what the oracle says to a prompt)."""
    folder = tmp_path_factory.mktemp("qwen3_5")
    hf_model = make_tiny_llama(
        folder, family="Qwen3_5", num_hidden_layers=4, head_dim=16, linear_key_head_dim=16,
        linear_value_head_dim=12, linear_num_key_heads=2, linear_num_value_heads=4,
        rms_norm_eps=1e-2, tie_word_embeddings=True,
    )  # fmt: skip
    known: dict[tuple[int, ...], list[int]] = {}

    def greedy(prompt: list[int]) -> list[int]:
        if tuple(prompt) not in known:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                for _ in range(NUM_TOKENS):
                    ids = torch.cat([ids, hf_model(ids).logits[:, -1:].argmax(-1)], dim=1)
            known[tuple(prompt)] = ids[0, len(prompt) :].tolist()
        return known[tuple(prompt)]

    return folder, greedy


def prompts() -> list[list[int]]:
    """Of 1 to 100 tokens: short of a page, on one, past a chunk of the kernel."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, 512, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def driver(model: tuple[Path, Greedy]) -> Driver:
    return Driver(
        model[0], max_model_len=128, page_size=PAGE, num_pages=80, max_num_seqs=4,
        max_num_batched_tokens=37, prefill_buckets=(37,), decode_buckets=(1, 4),
    )  # fmt: skip


def test_prompts_are_cut_and_mixed_with_decodes(driver: Driver, model: tuple[Path, Greedy]) -> None:
    """A budget of 37 tokens for four requests: chunks end anywhere, beside decodes."""
    driver.reset()
    requests = [Request(str(i), prompt, GREEDY) for i, prompt in enumerate(prompts())]
    got = driver.run(requests)
    assert got == {r.request_id: model[1](r.prompt_token_ids) for r in requests}
    assert driver.scheduler.stats().num_pages_used == 0


@pytest.mark.parametrize(
    ("length", "cached"), [(33, 32), (90, 64), (105, 104), (112, 104), (113, 112), (124, 120)]
)
def test_prefix_hits_go_on_from_a_state(
    driver: Driver, model: tuple[Path, Greedy], length: int, cached: int
) -> None:
    """The steps of the first request end at 32, 64, 100 and after each of its tokens: where a page
    ends too, at 32, 64, 104, 112 and 120, its state is found."""
    driver.reset()
    first = Request("first", list(PROMPT), GREEDY)
    driver.run([first])
    text = [*PROMPT, *first.output_token_ids]
    second = Request("second", text[:length], GREEDY.clone(max_tokens=4))
    driver.run([second])
    assert second.num_cached_tokens == cached
    assert second.output_token_ids == model[1](second.prompt_token_ids)[:4]


def test_no_hit_where_no_step_ended(driver: Driver, model: tuple[Path, Greedy]) -> None:
    """Keys and values of 24 tokens are there, the state after them is not."""
    driver.reset()
    driver.run([Request("first", list(PROMPT[:30]), GREEDY.clone(max_tokens=1))])
    second = Request("second", [*PROMPT[:28], 7, 8], GREEDY)
    driver.run([second])
    assert second.num_cached_tokens == 0
    assert second.output_token_ids == model[1](second.prompt_token_ids)


@pytest.fixture(scope="module", params=[1, 6], ids=["single-steps", "six-steps"])
def pump(model: tuple[Path, Greedy], request: pytest.FixtureRequest) -> CorePump:
    return CorePump(
        model[0], load_format="auto", page_size=PAGE, max_model_len=128, num_pages=17,
        max_decode_steps=request.param, prefill_buckets=(32,), decode_buckets=(1, 4),
    )  # fmt: skip


def test_preemption_changes_no_token(pump: CorePump, model: tuple[Path, Greedy]) -> None:
    """16 pages for four requests, which grow from 4 pages to 7."""
    before = pump.core.stats().num_preemptions
    pump.messages.clear()
    for i, prompt in enumerate(prompts()):
        pump.submit(f"r{i}", prompt, GREEDY)
        pump.turn()
    pump.drain()
    got = pump.tokens()
    assert got == {f"r{i}": model[1](prompt) for i, prompt in enumerate(prompts())}
    assert pump.core.stats().num_preemptions > before
    assert pump.core.stats().num_pages_used == 0


def test_states_of_aborted_requests_are_free(pump: CorePump, model: tuple[Path, Greedy]) -> None:
    pump.messages.clear()
    for i, prompt in enumerate(prompts()):
        pump.submit(f"a{i}", prompt, GREEDY)
    for _ in range(9):
        pump.turn()
    pump.abort(*(f"a{i}" for i in range(10)))
    pump.drain()
    assert pump.core.stats().num_pages_used == 0
    assert pump.tokens()["a10"] == model[1](prompts()[10])
    assert "abort" in pump.finish_reasons().values()
