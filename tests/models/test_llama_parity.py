"""Llama against Hugging Face transformers in float32: every configuration switch, every way to cut the text."""

from pathlib import Path

import numpy as np
import pytest

from jengine.request import Request, SamplingParams
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


@pytest.mark.parametrize("name", CONFIGS)
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


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "MinistralForCausalLM"])
def test_sliding_windows_match_transformers(architecture: str, tmp_path: Path) -> None:
    """One window for all layers, and windows that alternate with full attention (two KV groups)."""
    options = dict(architecture=architecture, sliding_window=20, num_hidden_layers=4)
    if architecture == "MinistralForCausalLM":
        options["layer_types"] = ["sliding_attention", "full_attention"] * 2
    hf_model = make_tiny_llama(tmp_path, **options)
    driver = Driver(tmp_path, max_model_len=64)
    assert len(driver.runner.groups) == (1 if architecture == "MistralForCausalLM" else 2)
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
    """(transformers model, engine driver) of the demo model, both float32 from the same GGUF file."""
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
    hf_model, driver = smollm2
    token_ids = np.random.default_rng(5).integers(0, 49152, 200).tolist()
    got = driver.logits(token_ids, [150, 50])
    assert np.abs(got - expected_logits(hf_model, token_ids)).max() <= TOLERANCE


def test_smollm2_greedy_tokens_match_transformers(smollm2) -> None:
    """32 prompts x 64 greedy tokens, batched here; there token by token with its own cache."""
    hf_model, driver = smollm2
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, 49152, int(rng.integers(3, 40))).tolist() for _ in range(32)]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    got = driver.run([Request(str(i), prompt, params) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = hf_model.generate(
                torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False,
                pad_token_id=0, eos_token_id=None,
            )[0, len(prompt):].tolist()  # fmt: skip
        assert got[str(i)] == expected, i
