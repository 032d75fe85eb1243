"""Every architecture that GGUF files are read for: a model written as llama.cpp's converter would
is the model that its Hugging Face folder holds, number by number.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jengine.config import EngineConfig, ModelArgs
from jengine.errors import LoadError
from jengine.layers.param import abstract_parameters
from jengine.loading.checkpoint import open_checkpoint
from jengine.loading.gguf_families import FAMILIES
from jengine.loading.rules import load_parameters
from jengine.models.loader import open_model
from jengine.models.registry import resolve_architecture
from tests.oracles.gguf_files import ARCHITECTURES, QuantType, llama_metadata, write_gguf
from tests.oracles.gguf_files import write_llama_gguf as write
from tests.oracles.tiny_llama import make_tiny_llama

GEMMA = dict(head_dim=32, sliding_window=12, query_pre_attn_scalar=32, tie_word_embeddings=True)
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * i for i in range(12)],
    "long_factor": [1.0 + 0.5 * i for i in range(12)],
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": dict(family="Llama"),
    "qwen2": dict(family="Qwen2"),
    "qwen2-tied": dict(family="Qwen2", tie_word_embeddings=True),
    "qwen3": dict(family="Qwen3", head_dim=32),
    "gemma2": dict(
        GEMMA, family="Gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma2-27b": dict(GEMMA, family="Gemma2", num_hidden_layers=46, query_pre_attn_scalar=16),
    "gemma3": dict(GEMMA, family="Gemma3", num_hidden_layers=7),
    "gemma3-linear": dict(GEMMA, family="Gemma3", rope_parameters=LINEAR),
    "phi3": dict(family="Phi3", sliding_window=12),
    "phi3-longrope": dict(
        family="Phi3", num_attention_heads=2, max_position_embeddings=128,
        original_max_position_embeddings=32, rope_parameters=LONGROPE,
    ),
}  # fmt: skip


def load(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """(config, parameters by path) in float32."""
    checkpoint = open_checkpoint(ModelArgs(str(path)))
    _, model_class = resolve_architecture(checkpoint.hf_config)
    cfg = model_class.config_class.from_hf(
        checkpoint.hf_config, dtype="float32", kv_dtype="float32", max_model_len=64
    )
    assert checkpoint.tensors is not None
    table = model_class.weight_table(cfg, checkpoint.dialect)
    abstract = abstract_parameters(model_class(cfg))
    return cfg, load_parameters(checkpoint.tensors, table, abstract, lambda path, read: read())


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_file_holds_the_model_of_its_folder(name: str, tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", make_tiny_llama(tmp_path / "hf", **CASES[name]))
    cfg, theirs = load(tmp_path / "hf")
    gguf_cfg, ours = load(tmp_path / "x.gguf")
    # The file holds LongRoPE's factor of cos and sin in float32.
    assert gguf_cfg.rope.scaling == pytest.approx(cfg.rope.scaling, rel=1e-7)
    assert dataclasses.replace(gguf_cfg, rope=cfg.rope) == cfg
    assert gguf_cfg.rope.inv_freq == cfg.rope.inv_freq
    assert list(ours) == list(theirs)
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_every_architecture_has_a_case() -> None:
    assert {name.partition("-")[0] for name in CASES} == {*FAMILIES}
    assert len(ARCHITECTURES) == len(FAMILIES)


def test_gemma3_says_its_scaled_length(tmp_path: Path) -> None:
    """Its `max_position_embeddings` is what the scaling gives, in either file."""
    old: dict[str, Any] = dict(rope_scaling={"rope_type": "linear", "factor": 8.0})
    model = make_tiny_llama(tmp_path / "hf", **CASES["gemma3-linear"])
    write(tmp_path / "x.gguf", model)
    for path, overrides in (("hf", {"rope_parameters": None, **old}), ("x.gguf", {})):
        config = EngineConfig.from_kwargs(str(tmp_path / path), hf_overrides=overrides)
        assert open_model(config).max_model_len == model.config.max_position_embeddings
    llama = make_tiny_llama(tmp_path / "llama", **old)
    config = EngineConfig.from_kwargs(str(tmp_path / "llama"))
    assert open_model(config).max_model_len == 8 * llama.config.max_position_embeddings


def test_windows_by_a_pattern_of_layers_are_refused(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "hf", **CASES["gemma3"])
    metadata = llama_metadata(model.config)
    metadata["gemma3.attention.sliding_window_pattern"] = [True, False, True]
    tensors = {"token_embd.weight": (np.zeros((32, 64), np.float32), QuantType.F32)}
    write_gguf(tmp_path / "x.gguf", metadata, tensors, "gemma3")
    with pytest.raises(LoadError, match="sliding_window_pattern differs between layers"):
        open_checkpoint(ModelArgs(str(tmp_path / "x.gguf")))
