"""The same request gives the same bits: the real model in bfloat16, logprobs compared exactly."""

from pathlib import Path

import numpy as np
import pytest

from jengine.request import SamplingParams
from tests.oracles.core_pump import CorePump

PARAMS = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=10, logprobs=3, ignore_eos=True)


@pytest.fixture(scope="module")
def pump(smollm2_gguf: Path) -> CorePump:
    return CorePump(
        smollm2_gguf,
        dtype="bfloat16",
        load_format="auto",
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        prefill_buckets=(32, 128),
        decode_buckets=(1, 8),
        num_pages=160,
        page_size=16,
    )


def _prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 49152, length).tolist()


def _run_target(pump: CorePump, prompt: list[int]) -> list[tuple]:
    """Serve what is queued; token ids and exact logprobs of the request called "target"."""
    pump.submit("target", prompt, PARAMS, seed=1234)
    pump.drain()
    outputs = pump.outputs()["target"]
    bits = [
        (tuple(o.new_token_ids), tuple(lp.token_ids), tuple(lp.logprobs))
        for o in outputs
        for lp in o.logprobs or []
    ]
    pump.messages.clear()
    assert len(bits) == PARAMS.max_tokens
    return bits


def test_neighbours_chunks_and_prefix_hits_change_no_bit(pump: CorePump) -> None:
    prompt = _prompt(0, 90)
    alone = _run_target(pump, prompt)

    hits = pump.core.stats().prefix_hits
    assert _run_target(pump, prompt) == alone  # from cached pages
    assert pump.core.stats().prefix_hits > hits

    for num_companions in (1, 4, 7):
        pump.core.scheduler.reset_prefix_cache()
        for i in range(num_companions):
            greedy = PARAMS.clone(temperature=0.0, top_p=1.0, max_tokens=5 + 4 * i)
            pump.submit(f"c{i}", _prompt(i + 1, 20 + 33 * i), greedy)
        for _ in range(num_companions):  # so that the target's prompt is cut differently each time
            pump.turn()
        assert _run_target(pump, prompt) == alone, num_companions


def test_the_comparison_sees_a_changed_context(pump: CorePump) -> None:
    prompt = _prompt(0, 90)
    other = [(prompt[0] + 1) % 49152, *prompt[1:]]
    assert _run_target(pump, prompt) != _run_target(pump, other)
