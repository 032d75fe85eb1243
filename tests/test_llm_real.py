"""LLM over the real engine, with transformers as the oracle, and over the demo model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jengine import LLM, SamplingParams
from tests.oracles.tiny_llama import make_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, make_tiny_llama(folder)


@pytest.fixture(scope="module")
def real(tiny: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(
        str(tiny[0]),
        dtype="float32",
        max_num_seqs=4,
        max_num_batched_tokens=32,
        num_gpu_blocks_override=48,
        decode_buckets=(4,),
        prefill_buckets=(32,),
        cache_dir=str(tmp_path_factory.mktemp("executables")),
    ) as llm:
        yield llm


def test_real_tokens_and_live_objects(real: LLM, tiny: tuple[Path, Any]) -> None:
    prompt = list(range(5, 45))
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    (output,) = real.generate([prompt], params, use_tqdm=False)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, tiny[1](ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        hidden = tiny[1].model(ids).last_hidden_state[0]
    assert output.outputs[0].token_ids == ids[0, len(prompt) :].tolist()

    ours = np.asarray(real.hidden_states(ids[0].tolist()))
    assert ours.shape == (48, 64)
    np.testing.assert_allclose(ours, hidden.numpy(), atol=1e-4)
    embedding = next(v for k, v in real.params.items() if k.endswith("embed_tokens.weight"))
    np.testing.assert_array_equal(embedding, tiny[1].model.embed_tokens.weight.detach().numpy())
    assert real.apply_model(type) == [type(real.model)]
    assert callable(real.step_fn)
    assert real.wait_until_compiled() == len(real._core.runner.programs.ready) == 6


def test_real_chat_on_default_parameters(real: LLM) -> None:
    (output,) = real.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
    assert output.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert 1 <= len(output.outputs[0].token_ids) <= 16
    assert output.outputs[0].finish_reason in ("length", "stop")


@pytest.mark.slow
def test_the_demo_model_knows_paris(smollm2_gguf: Path) -> None:
    with LLM(str(smollm2_gguf), max_model_len=256, max_num_seqs=2) as llm:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        (output,) = llm.chat(question, SamplingParams(temperature=0.0, max_tokens=24))
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
