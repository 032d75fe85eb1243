"""A model served on one device and on the ranks of a mesh: the logits of every sampled token."""

from pathlib import Path
from typing import Any

import numpy as np

from jengine.request import Request, SamplingParams
from tests.oracles.driver import Driver

# Unequal in all: more than run at once, prompts above and below what a step holds.
REQUESTS = ((5, 7), (40, 4), (1, 9), (17, 3), (33, 5))  # tokens of the prompt, of the answer
OPTIONS: dict[str, Any] = dict(
    max_num_seqs=3, max_num_batched_tokens=32, prefill_buckets=(32,), decode_buckets=(3,),
    max_model_len=64, num_pages=16,
)  # fmt: skip


def open_driver(folder: Path, **options: Any) -> Driver:
    return Driver(folder, **(OPTIONS | options))


def serve(driver: Driver) -> tuple[dict[str, list[int]], np.ndarray]:
    """(tokens of each request, float32 logits [N, V] of all, ordered by request and position), of
    requests that join and leave at will.
    """
    driver.reset()
    rng = np.random.default_rng(0)
    vocab_size = driver.runner.vocab_size
    requests = [
        Request(
            f"r{i}",
            rng.integers(3, vocab_size, prompt).tolist(),
            SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True),
        )
        for i, (prompt, answer) in enumerate(REQUESTS)
    ]
    for request in requests:
        driver.scheduler.add(request)
    logits: dict[tuple[str, int], np.ndarray] = {}
    while (plan := driver.scheduler.schedule()) is not None:
        handle = driver.runner.dispatch(plan)
        rows = np.asarray(handle.output.logits)
        for item, row in zip(plan.scheduled, rows, strict=False):
            if item.samples:
                logits[item.request.request_id, item.start + item.num_tokens] = row
        driver.scheduler.update(plan, driver.runner.collect(handle))
    driver.scheduler.check_integrity()
    assert len(logits) == sum(answer for _, answer in REQUESTS)
    tokens = {request.request_id: request.output_token_ids for request in requests}
    return tokens, np.stack([logits[key] for key in sorted(logits)])
