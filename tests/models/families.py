"""The tiny random models of every dense family, and the comparison of each with transformers.

`python -m tests.models.families` prints the parity figures of docs/models.md.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.oracles.driver import Driver
from tests.oracles.tiny_llama import VOCAB_SIZE, make_tiny_llama

TOLERANCE = 1e-4
LENGTH = 40  # beyond every window below
CHUNKS = ([LENGTH], [7, 1, 16, 16], [1] * LENGTH)
TOKENS = np.random.default_rng(0).integers(3, VOCAB_SIZE, LENGTH).tolist()


@dataclass(frozen=True)
class Case:
    """One config of one family: `config` overrides the fields of `make_tiny_llama`."""

    family: str  # of transformers' class
    config: dict[str, Any] = field(default_factory=dict)
    groups: int = 1  # of the KV cache


CASES = {
    "llama": Case("Llama"),
    "mistral": Case("Mistral", dict(sliding_window=12)),
    "ministral": Case(
        "Ministral",
        dict(head_dim=16, sliding_window=12, layer_types=["sliding_attention", "full_attention"]),
        groups=2,
    ),
    "qwen3": Case("Qwen3", dict(head_dim=32)),
    "qwen2": Case("Qwen2"),
    "qwen2-windows": Case(
        "Qwen2",
        dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=12, max_window_layers=1),
        groups=2,
    ),
    "gemma2": Case(
        "Gemma2",
        dict(
            hidden_size=48, head_dim=32, sliding_window=12, query_pre_attn_scalar=24,
            tie_word_embeddings=True, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        ),
        groups=2,
    ),
    "gemma3": Case(
        "Gemma3",
        dict(
            num_hidden_layers=6, head_dim=32, sliding_window=12, query_pre_attn_scalar=24,
            tie_word_embeddings=True,
        ),
        groups=2,
    ),
    "gemma3-scaled-rope": Case(
        "Gemma3",
        dict(
            head_dim=16, sliding_window=12, sliding_window_pattern=2,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        ),
        groups=2,
    ),
    "phi3": Case("Phi3"),
    "phi3-longrope-window": Case(
        "Phi3",
        dict(
            sliding_window=12, num_attention_heads=2, max_position_embeddings=128,
            original_max_position_embeddings=32,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.1 * i for i in range(12)],
                "long_factor": [1.0 + 0.5 * i for i in range(12)],
            },
        ),
    ),
    "granite": Case(
        "Granite",
        dict(
            attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.4,
            logits_scaling=2.5, mlp_bias=True, attention_bias=True,
        ),
    ),
    "olmo2": Case("Olmo2"),
    "cohere": Case("Cohere", dict(logit_scale=2.0, tie_word_embeddings=True)),
    "cohere-qk-norm": Case("Cohere", dict(logit_scale=2.0, use_qk_norm=True, attention_bias=True)),
    "cohere2": Case(
        "Cohere2", dict(num_hidden_layers=4, sliding_window=12, logit_scale=2.0), groups=2
    ),
    "glm4": Case("Glm4", dict(head_dim=32, attention_bias=True)),
}  # fmt: skip


def build(case: Case, folder: Path) -> tuple[transformers.PreTrainedModel, Driver]:
    """The oracle, and our engine over its checkpoint. Only eager attention has soft caps."""
    config: dict[str, Any] = {"attn_implementation": "eager", **case.config}
    hf_model = make_tiny_llama(folder, family=case.family, **config)
    return hf_model, Driver(
        folder, max_model_len=64, num_pages=16, max_num_seqs=1, prefill_buckets=(LENGTH,),
        decode_buckets=(1,), max_num_batched_tokens=LENGTH,
    )  # fmt: skip


def expected_logits(hf_model: Any) -> np.ndarray:
    with torch.no_grad():
        return hf_model(torch.tensor([TOKENS])).logits[0].numpy()


def errors(driver: Driver, expected: np.ndarray) -> Iterator[float]:
    """Largest logit error of each way to cut the text, the step's own logits included."""
    for chunks in CHUNKS:
        got = driver.logits(TOKENS, chunks)
        own = np.stack(driver.step_logits) - expected[np.cumsum(chunks) - 1]
        yield float(max(np.abs(got - expected).max(), np.abs(own).max()))


@torch.no_grad()
def permuted(hf_model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(parameter, the oracle's logits with two of its rows or entries swapped), one by one. Of the
    layers the second is enough: they load by the same rules.
    """
    for name, parameter in hf_model.named_parameters():
        if ".layers." in name and ".layers.1." not in name:
            continue
        rows = TOKENS[:2] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else [0, 1]
        saved = parameter[rows].clone()
        parameter[rows] = saved.flip(0)
        yield name, expected_logits(hf_model)
        parameter[rows] = saved


def main() -> None:
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            hf_model, driver = build(case, Path(folder))
            print(f"{name:24} {max(errors(driver, expected_logits(hf_model))):.1e}")


if __name__ == "__main__":
    main()
