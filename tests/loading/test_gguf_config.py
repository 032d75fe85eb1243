"""GGUF metadata -> config.json: the way back from a converted model, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, Qwen3Config

from jengine.errors import LoadError
from jengine.loading.gguf_config import (
    generation_config_from_gguf,
    hf_config_from_gguf,
    llama3_scaling,
)
from jengine.loading.gguf_source import GGUFFile
from tests.oracles.gguf_files import (
    QuantType,
    llama3_divisors,
    llama_metadata,
    write_gguf,
    write_llama_gguf,
)
from tests.oracles.tiny_llama import make_tiny_llama

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS = {
    "default": {},
    "untied, bias, head size": dict(
        attention_bias=True, mlp_bias=True, head_dim=32, num_key_value_heads=1
    ),
    "tied": dict(tie_word_embeddings=True),
    "linear": dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "yarn": dict(
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ),
    "llama3": dict(
        rope_scaling=LLAMA3, rope_theta=500000.0, head_dim=64, max_position_embeddings=131072
    ),
}
FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "vocab_size",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_conversion(tmp_path: Path, name: str) -> None:
    model = make_tiny_llama(tmp_path / "hf", **CONFIGS[name])
    write_llama_gguf(tmp_path / "x.gguf", model)
    config = hf_config_from_gguf(GGUFFile(tmp_path / "x.gguf"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    for field in FIELDS:
        assert config[field] == getattr(model.config, field), field
    # transformers itself understands the result.
    again = LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"})
    assert again.rope_parameters == model.config.rope_parameters


def test_qwen3_config_survives_conversion(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(head_dim=32, tie_word_embeddings=True, rope_theta=1e6)
    model = make_tiny_llama(tmp_path / "hf", family="Qwen3", **options)
    write_llama_gguf(tmp_path / "x.gguf", model)
    config = hf_config_from_gguf(GGUFFile(tmp_path / "x.gguf"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    for field in set(FIELDS) - {"mlp_bias"}:
        assert config[field] == getattr(model.config, field), field
    again = Qwen3Config(**{k: v for k, v in config.items() if k != "model_type"})
    assert again.rope_parameters == model.config.rope_parameters


def test_the_demo_model(smollm2_gguf: Path) -> None:
    file = GGUFFile(smollm2_gguf)
    config = hf_config_from_gguf(file)
    expected = {  # from the model's config.json on the Hub
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-05,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "vocab_size": 49152,
        "tie_word_embeddings": True, "attention_bias": False,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert "rope_scaling" not in config
    assert generation_config_from_gguf(file.metadata) == {"eos_token_id": [2], "bos_token_id": 1}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("factor", "low", "high"), [(8.0, 1.0, 4.0), (32.0, 1.0, 4.0), (16.0, 0.5, 3.0)]
)
def test_llama3_scaling_is_found_from_its_divisors(
    head_dim: int, factor: float, low: float, high: float
) -> None:
    rope = {**LLAMA3, "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    config = LlamaConfig(head_dim=head_dim, rope_parameters={**rope, "rope_theta": 500000.0})
    found = llama3_scaling(llama3_divisors(config), 500000.0, 8192)
    assert found == rope


def test_other_divisors_are_refused() -> None:
    divisors = np.linspace(1, 8, 32, dtype=np.float32)
    for value in (divisors, np.ones(32, np.float32)):
        with pytest.raises(LoadError, match=r"rope_freqs.weight"):
            llama3_scaling(value, 500000.0, 8192)


def test_generation_config() -> None:
    metadata = {
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.eom_token_id": 5,
        "general.sampling.temp": float(np.float32(0.6)),
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": float(np.float32(1.05)),
    }
    assert generation_config_from_gguf(metadata) == {
        "eos_token_id": [5, 7],
        "temperature": 0.6,
        "top_k": 20,
        "repetition_penalty": 1.05,
    }


def test_an_end_of_turn_that_no_key_names_is_found() -> None:
    metadata = {
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.tokens": ["<pad>", "<eos>", "<|im_end|>", "a", "<end_of_turn>"],
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 3],  # <|im_end|> is text here
    }
    assert generation_config_from_gguf(metadata) == {"eos_token_id": [1, 4]}
    named = {**metadata, "tokenizer.ggml.eot_token_id": 3}
    assert generation_config_from_gguf(named) == {"eos_token_id": [1, 3]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.block_count": None}, "no metadata key 'llama.block_count'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is not the head size 16"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.attention.head_count_kv": [1, 2]}, "head_count_kv differs between layers"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: dict, message: str) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16)
    metadata = {k: v for k, v in {**llama_metadata(config), **change}.items() if v is not None}
    embed = np.zeros((32, 64), np.float32)
    write_gguf(tmp_path / "x.gguf", metadata, {"token_embd.weight": (embed, QuantType.F32)})
    with pytest.raises(LoadError, match=message):
        hf_config_from_gguf(GGUFFile(tmp_path / "x.gguf"))


def test_other_architectures_are_named(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": (np.zeros((4, 4), np.float32), QuantType.F32)}
    write_gguf(tmp_path / "x.gguf", {}, tensors, architecture="falcon")
    with pytest.raises(LoadError, match="architecture 'falcon' is not supported; known: llama"):
        hf_config_from_gguf(GGUFFile(tmp_path / "x.gguf"))


def test_per_layer_arrays_that_agree_count_as_one_number(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16)
    metadata = {**llama_metadata(config), "llama.attention.head_count_kv": [2, 2, 2]}
    tensors = {"token_embd.weight": (np.zeros((32, 64), np.float32), QuantType.F32)}
    write_gguf(tmp_path / "x.gguf", metadata, tensors)
    assert hf_config_from_gguf(GGUFFile(tmp_path / "x.gguf"))["num_key_value_heads"] == 2
