"""Llama against Hugging Face transformers in float32: every configuration switch, every way to cut
the text.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jengine.request import Request, SamplingParams
from tests.models.cases import by_default
from tests.oracles.driver import Driver
from tests.oracles.tiny_llama import make_tiny_llama

torch = pytest.importorskip("torch")

TOLERANCE = 1e-4
LENGTH = 60
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SENTENCES = (
    "The library keeps every page that a request has filled, so that the next one may read it.",
    "In 1969 two people walked on the Moon while a third one waited above them.",
    "To make bread, mix 500 g of flour with 325 g of water, salt and a little yeast.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "A river does not ask the sea for permission; it arrives, and is called by another name.",
    "The patient had a fever of 38.9 degrees for 3 days and then, without treatment, none.",
    "Dear Sir or Madam, I am writing to complain about the delivery of my new washing machine.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
)
STARTS = ("Therefore", "However, the first", "Question: what does this mean? Answer:", "Let us now")
CONFIGS = {
    "mha": dict(num_attention_heads=4, num_key_value_heads=4),
    "gqa-2": dict(num_attention_heads=4, num_key_value_heads=2),
    "mqa": dict(num_attention_heads=4, num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "untied-bias": dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "head-dim": dict(head_dim=32),
    "rope-linear": dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "rope-dynamic": dict(
        rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=32
    ),
    "rope-llama3": dict(rope_scaling=LLAMA3, rope_theta=500000.0),
    "rope-yarn": dict(
        rope_scaling={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        },
        max_position_embeddings=128,
    ),
    "rope-longrope": dict(
        rope_scaling={
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
        },
        max_position_embeddings=128,
    ),
}  # fmt: skip


def text(seed: int = 0, vocab_size: int = 128) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab_size, LENGTH).tolist()


def expected_logits(hf_model, token_ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return hf_model(torch.tensor([token_ids])).logits[0].float().numpy()


@pytest.mark.parametrize(
    "name", by_default(CONFIGS, "gqa-2", "untied-bias", "head-dim", "rope-llama3", "rope-yarn")
)
def test_logits_match_transformers(name: str, tmp_path: Path) -> None:
    hf_model = make_tiny_llama(tmp_path, **CONFIGS[name])
    # "dynamic" stretches to the length of the whole text there, to max_model_len here.
    limit = LENGTH if name == "rope-dynamic" else 64
    driver = Driver(tmp_path, max_model_len=limit)
    token_ids = text(vocab_size=hf_model.config.vocab_size)
    expected = expected_logits(hf_model, token_ids)
    for chunks in ([LENGTH], [7, 1, 20, 16, 16], [30] + [1] * 30):
        got = driver.logits(token_ids, chunks)
        assert np.abs(got - expected).max() <= TOLERANCE, chunks


def test_a_permuted_weight_fails(tmp_path: Path) -> None:
    """The comparison can fail: swapping two rows of one projection must break it."""
    hf_model = make_tiny_llama(tmp_path)
    driver = Driver(tmp_path, max_model_len=64)
    token_ids = text(vocab_size=hf_model.config.vocab_size)
    weight = hf_model.model.layers[1].mlp.up_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]].clone()
    got = driver.logits(token_ids, [LENGTH])
    assert np.abs(got - expected_logits(hf_model, token_ids)).max() > 10 * TOLERANCE


@pytest.mark.parametrize("family", ["Mistral", "Ministral"])
def test_sliding_windows_match_transformers(family: str, tmp_path: Path) -> None:
    """One window for all layers, and windows that alternate with full attention (two KV groups)."""
    options: dict[str, Any] = dict(
        family=family, sliding_window=20, num_hidden_layers=4, head_dim=16
    )
    if family == "Ministral":
        options["layer_types"] = ["sliding_attention", "full_attention"] * 2
    hf_model = make_tiny_llama(tmp_path, **options)
    driver = Driver(tmp_path, max_model_len=64)
    assert len(driver.runner.groups) == (1 if family == "Mistral" else 2)
    token_ids = text(vocab_size=hf_model.config.vocab_size)
    expected = expected_logits(hf_model, token_ids)
    for chunks in ([LENGTH], [10, 30, 20], [30] + [1] * 30):
        assert np.abs(driver.logits(token_ids, chunks) - expected).max() <= TOLERANCE
    # Through the scheduler, pages below the window are given back while the text grows.
    request = Request("r", token_ids[:30], SamplingParams(temperature=0, max_tokens=25))
    got = driver.run([request])["r"]
    with torch.no_grad():
        ids = torch.tensor([token_ids[:30]])
        for _ in range(25):
            ids = torch.cat([ids, hf_model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert got == ids[0, 30:].tolist()


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path):
    """(transformers model, engine driver) of the demo model, float32 from the same GGUF file."""
    transformers = pytest.importorskip("transformers")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    driver = Driver(
        smollm2_gguf, max_model_len=512, max_num_seqs=32, max_num_batched_tokens=256,
        num_pages=400, prefill_buckets=(256,), decode_buckets=(32,),
    )  # fmt: skip
    return hf_model, driver


def test_smollm2_logits_match_transformers(smollm2) -> None:
    """The oracle runs in float64 here: in float32 its own rounding (9e-5) is most of it."""
    hf_model, driver = smollm2
    tokenizer = driver.loaded.checkpoint.load_tokenizer()
    token_ids = tokenizer.encode(" ".join(SENTENCES))[:200]
    exact = copy.deepcopy(hf_model).double()
    got = driver.logits(token_ids, [150, len(token_ids) - 150])
    assert np.abs(got - expected_logits(exact, token_ids)).max() <= TOLERANCE


def test_smollm2_greedy_tokens_match_transformers(smollm2) -> None:
    """32 prompts x 64 tokens, batched here. There, one pass over each whole text: if every token is
    the argmax after the tokens before it, greedy decoding gives exactly these tokens."""
    hf_model, driver = smollm2
    tokenizer = driver.loaded.checkpoint.load_tokenizer()
    prompts = [tokenizer.encode(f"{SENTENCES[i % 8]} {STARTS[i // 8]}") for i in range(32)]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    got = driver.run([Request(str(i), prompt, params) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = hf_model(torch.tensor([prompt + got[str(i)]])).logits[0]
        expected = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert len(expected) == 64 and got[str(i)] == expected, i
