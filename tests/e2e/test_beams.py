"""Beam search of a server on a tiny model, and of `LLM`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jengine import LLM, BeamSearchParams
from tests.e2e.live import live_server
from tests.server.harness import post

pytestmark = pytest.mark.slow
SIZES: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256}


@pytest.mark.parametrize("penalty", [1.0, 0.3])
def test_http_gives_what_llm_gives(tiny_llama: Path, tmp_path: Path, penalty: float) -> None:
    prompts = [np.random.default_rng(i).integers(3, 400, 20 + 9 * i).tolist() for i in (0, 1, 2)]
    params = BeamSearchParams(beam_width=5, max_tokens=12, length_penalty=penalty)
    with LLM(str(tiny_llama), **SIZES, num_gpu_blocks_override=96) as llm:
        expected = llm.beam_search(prompts, params)
    body = {"prompt": prompts, "n": 5, "max_tokens": 12, "length_penalty": penalty, "logprobs": 10}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    with live_server(tmp_path / "server.log", *flags, model=str(tiny_llama)) as server:
        status, answer, _ = post(
            server.http + "/v1/completions",
            {**body, "use_beam_search": True, "return_token_ids": True},
        )
        assert status == 200, answer
        server.wait_idle()
    assert [choice["index"] for choice in answer["choices"]] == list(range(15))
    beams = [beam for output in expected for beam in output.sequences]
    starts = [len(prompt) for prompt in prompts for _ in range(5)]
    for choice, beam, start in zip(answer["choices"], beams, starts, strict=True):
        assert choice["token_ids"] == beam.tokens[start:]
        assert choice["finish_reason"] == beam.finish_reason
        scores = choice["logprobs"]["token_logprobs"]
        assert sum(scores) == pytest.approx(beam.cum_logprob, abs=1e-6)
