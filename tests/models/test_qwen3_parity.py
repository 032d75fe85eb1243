"""Qwen3 (dense) against Hugging Face transformers in float32: every switch, every way to cut the
text, both file formats.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jengine.input_processor import TokensPrompt
from jengine.llm import LLM
from jengine.models.qwen3 import Qwen3Config
from jengine.request import SamplingParams
from tests.models.cases import by_default
from tests.oracles.driver import Driver
from tests.oracles.dummy_model import write_dummy_model
from tests.oracles.gguf_files import write_llama_gguf
from tests.oracles.tiny_llama import make_tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
LENGTH = 60
CHUNKS = ([LENGTH], [7, 1, 20, 16, 16], [30] + [1] * 30, [1] * LENGTH)
CONFIGS: dict[str, dict[str, Any]] = {
    "head-dim": dict(head_dim=32),
    "mha": dict(head_dim=16, num_key_value_heads=4),
    "tied": dict(head_dim=16, tie_word_embeddings=True),
    "bias": dict(head_dim=16, attention_bias=True),
    "default-head-dim": dict(num_attention_heads=2, num_key_value_heads=1),
    "yarn": dict(
        head_dim=32,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        max_position_embeddings=128,
    ),
    "windows-after-two-layers": dict(
        head_dim=16, num_hidden_layers=4, use_sliding_window=True, sliding_window=20,
        max_window_layers=2,
    ),
}  # fmt: skip


def expected_logits(hf_model, token_ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return hf_model(torch.tensor([token_ids])).logits[0].float().numpy()


def text(vocab_size: int) -> list[int]:
    return np.random.default_rng(0).integers(3, vocab_size, LENGTH).tolist()


@pytest.mark.parametrize("name", by_default(CONFIGS, "head-dim", "bias", "tied"))
def test_logits_match_transformers(name: str, tmp_path: Path) -> None:
    hf_model = make_tiny_llama(tmp_path, family="Qwen3", **CONFIGS[name])
    driver = Driver(tmp_path, max_model_len=64)
    assert len(driver.runner.groups) == (2 if name.startswith("windows") else 1)
    token_ids = text(hf_model.config.vocab_size)
    expected = expected_logits(hf_model, token_ids)
    for chunks in CHUNKS:
        got = driver.logits(token_ids, chunks)
        assert np.abs(got - expected).max() <= TOLERANCE, chunks


@pytest.mark.parametrize("config", [{}, dict(tie_word_embeddings=True), dict(attention_bias=True)])
def test_gguf_logits_match_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    hf_model = make_tiny_llama(tmp_path / "hf", family="Qwen3", head_dim=32, **config)
    write_llama_gguf(tmp_path / "x.gguf", hf_model)
    driver = Driver(tmp_path / "x.gguf", max_model_len=64)
    assert driver.loaded.architecture == "Qwen3ForCausalLM"
    token_ids = text(hf_model.config.vocab_size)
    got = driver.logits(token_ids, [LENGTH])
    assert np.abs(got - expected_logits(hf_model, token_ids)).max() <= TOLERANCE


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_a_permuted_weight_fails(norm: str, tmp_path: Path) -> None:
    """The comparison can fail: swapping two entries of one head norm must break it."""
    hf_model = make_tiny_llama(tmp_path, family="Qwen3", head_dim=32)
    driver = Driver(tmp_path, max_model_len=64)
    token_ids = text(hf_model.config.vocab_size)
    weight = getattr(hf_model.model.layers[1].self_attn, norm).weight.data
    weight[[0, 1]] = weight[[1, 0]].clone()
    got = driver.logits(token_ids, [LENGTH])
    assert np.abs(got - expected_logits(hf_model, token_ids)).max() > 10 * TOLERANCE


def test_defaults_are_those_of_transformers() -> None:
    """For fields that an old or a hand-written config.json leaves out."""
    said = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=30,
                num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    for extra in ({}, dict(use_sliding_window=True, sliding_window=64)):
        theirs = transformers.Qwen3Config(**said, **extra)
        ours = Qwen3Config.from_hf(
            {**said, **extra}, dtype="float32", kv_dtype="float32", max_model_len=64
        )
        names = ("head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
                 "attention_bias")  # fmt: skip
        assert [getattr(ours, n) for n in names] == [getattr(theirs, n) for n in names]
        windows = [64 if kind == "sliding_attention" else None for kind in theirs.layer_types]
        assert list(ours.layer_windows) == windows
    assert windows[27:] == [None, 64, 64]


def test_a_folder_with_only_a_config_serves_dummy_weights(tmp_path: Path) -> None:
    folder = write_dummy_model(
        tmp_path, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=32
    )
    with LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, num_pages=32, max_num_seqs=2,
        max_num_batched_tokens=32, keep_executables=False,
    ) as llm:  # fmt: skip
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=[5, 6, 7])] * 2,
            SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
        )
    tokens = [output.outputs[0].token_ids for output in outputs]
    assert len(tokens[0]) == 5 and tokens[0] == tokens[1]
