"""Gradients of every kind of layer that has one, against transformers' autograd in float32."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jengine.runtime.forward import packed
from tests.oracles.tiny_llama import make_tiny_llama

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from tests.models import families, test_deepseek_parity, test_moe_parity  # they import both

LENGTHS = (25, 15)
CASES: dict[str, dict[str, Any]] = {
    "window": dict(sliding_window=12, family="Mistral"),
    "soft-caps": dict(family="Gemma2", **families.CASES["gemma2"].config),
    "experts": test_moe_parity.CASES["qwen3"],
    "sinks, biases of experts": test_moe_parity.CASES["gpt-oss"],
    "latents": test_deepseek_parity.CASES["v2-lite"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients_match_autograd(name: str, tmp_path: Path) -> None:
    config = dict(CASES[name])
    if name == "soft-caps":
        config["attn_implementation"] = "eager"
    model = make_tiny_llama(tmp_path, **config)
    runner = test_moe_parity.build_driver(tmp_path).runner
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 512, length).tolist() for length in LENGTHS]
    ids, lengths = packed(texts)
    logprobs = runner.logprobs_fn()
    grads = jax.jit(jax.grad(lambda params: logprobs(params, ids, lengths).sum()))(runner.params)

    for text in texts:
        scores = model(torch.tensor([text])).logits[0].log_softmax(-1)
        scores[torch.arange(len(text) - 1), torch.tensor(text[1:])].sum().backward()
    theirs = {
        n.removeprefix("model."): p.grad.numpy()
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    shared = [n for n in theirs if n in grads and grads[n].shape == theirs[n].shape]
    assert {"embed_tokens.weight", "norm.weight"} <= set(shared)
    for other in shared:
        limit = 2e-5 * np.abs(theirs[other]).max()
        np.testing.assert_allclose(grads[other], theirs[other], rtol=0, atol=limit, err_msg=other)
