"""Config files that say little, or say it under older names, mean what transformers makes of them:
reading such a file and reading the whole one that transformers writes for it are the same.
"""

import fnmatch
from typing import Any

import pytest

from jengine.errors import LoadError
from jengine.models.registry import resolve_architecture

transformers = pytest.importorskip("transformers")

SAID = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=30,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
FACTORS = {"short_factor": [1.5] * 8, "long_factor": [2.5] * 8}
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2-unused-window": ("Qwen2", dict(use_sliding_window=False, sliding_window=131072)),
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=64)),
    "gemma2": ("Gemma2", {}),
    "gemma3": ("Gemma3", {}),
    "gemma3-of-2025": (
        "Gemma3",
        dict(
            rope_theta=5e5, rope_local_base_freq=2e4, sliding_window_pattern=3,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
    ),
    "phi3": ("Phi3", {}),
    "phi3-longrope": (
        "Phi3",
        dict(rope_scaling={"type": "longrope", **FACTORS}, max_position_embeddings=131072),
    ),
    "phi3-partial": ("Phi3", dict(partial_rotary_factor=0.75, rope_theta=5e5)),
    "granite": ("Granite", dict(embedding_multiplier=12.0, logits_scaling=8.0)),
    "granite-silent": ("Granite", {}),
    "olmo2": ("Olmo2", dict(rope_theta=5e5)),
    "olmo2-silent": ("Olmo2", {}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {}),
    "cohere2-of-2024": ("Cohere2", dict(sliding_window_pattern=3, rope_theta=5e4)),
    "glm4": ("Glm4", {}),
    "glm4-whole-heads": ("Glm4", dict(partial_rotary_factor=1.0)),
    "mixtral": ("Mixtral", {}),
    "mixtral-window": ("Mixtral", dict(sliding_window=4096, num_local_experts=4)),
    "qwen2-moe": ("Qwen2Moe", {}),
    "qwen2-moe-windows": ("Qwen2Moe", dict(use_sliding_window=True, sliding_window=64)),
    "qwen3-moe": ("Qwen3Moe", {}),
    "qwen3-moe-some-sparse": (
        "Qwen3Moe",
        dict(
            num_experts=64, decoder_sparse_step=3, mlp_only_layers=[2, 3], norm_topk_prob=True,
            use_sliding_window=True, sliding_window=64, max_window_layers=5,
        ),
    ),
    "qwen3-next": ("Qwen3Next", {}),
    "qwen3-next-of-2025": (
        "Qwen3Next",
        dict(
            rope_theta=1e7, partial_rotary_factor=0.5, full_attention_interval=3,
            linear_num_value_heads=16, mlp_only_layers=[1], decoder_sparse_step=2,
            norm_topk_prob=False, num_experts=64, shared_expert_intermediate_size=1024,
        ),
    ),
    "qwen3.5": ("Qwen3_5", {}),
    "qwen3.5-sections": (
        "Qwen3_5",
        dict(
            linear_key_head_dim=64, linear_conv_kernel_dim=3,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
        ),
    ),
    "qwen3.5-moe": ("Qwen3_5Moe", {}),
    "gpt-oss": ("GptOss", {}),
    "gpt-oss-of-2025": (
        "GptOss",
        dict(
            num_local_experts=32, swiglu_limit=7.0, rope_theta=150000,
            rope_scaling={
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 4096,
            },
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_terse_file_means_what_transformers_makes_of_it(name: str) -> None:
    family, fields = FILES[name]
    architecture = f"{family}ForCausalLM"
    _, model_class = resolve_architecture({"architectures": [architecture]})
    config_class = getattr(transformers, architecture).config_class

    terse = SAID | fields
    whole = config_class(**terse).to_dict()
    assert read(model_class, terse) == read(model_class, whole)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_types", ["sliding_attention"] * 30),
        ("layer_types", ["linear_attention"]),
        ("linear_num_value_heads", 24),
        ("hidden_act", "gelu_pytorch_tanh"),
    ],
)
@pytest.mark.parametrize("family", ["Qwen3Next", "Qwen3_5", "Qwen3_5Moe"])
def test_hybrids_that_are_not_supported_are_refused(family: str, field: str, value: Any) -> None:
    _, model_class = resolve_architecture({"architectures": [f"{family}ForCausalLM"]})
    with pytest.raises(LoadError, match=field):
        read(model_class, SAID | {field: value})


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_longrope_of_early_phi3_files(kind: str) -> None:
    """transformers 5 itself refuses these: the original length lies outside `rope_scaling`."""
    _, phi3 = resolve_architecture({"architectures": ["Phi3ForCausalLM"]})
    early, today = (
        SAID | dict(rope_scaling={"type": name, **FACTORS}, max_position_embeddings=131072)
        for name in (kind, "longrope")
    )
    assert read(phi3, early) == read(phi3, today)
    assert read(phi3, early) != read(phi3, SAID)


def read(model_class: Any, hf: dict[str, Any]) -> Any:
    return model_class.config_class.from_hf(
        hf, dtype="float32", kv_dtype="float32", max_model_len=8192
    )


@pytest.mark.parametrize("family", ["Qwen3Next", "Qwen3_5", "Qwen3_5Moe"])
def test_layers_that_predict_further_tokens_are_left_out(family: str) -> None:
    _, model_class = resolve_architecture({"architectures": [f"{family}ForCausalLM"]})
    ignored = model_class.weight_table(read(model_class, SAID), "hf").ignored
    for name, is_ignored in (("mtp.layers.0.mlp.gate.weight", True), ("model.norm.weight", False)):
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored) == is_ignored
