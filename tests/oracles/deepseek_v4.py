"""DeepSeek-V4 checkpoints for tests: golden ones, and random ones that transformers can compute."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "models" / "golden" / "deepseek_v4"
SLIDING, SPARSE, HEAVY = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
# Of transformers' classes. Few index heads would often score exactly 0, and ties are open.
TINY: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, moe_intermediate_size=48, num_attention_heads=4,
    num_key_value_heads=1, head_dim=32, q_lora_rank=24, qk_rope_head_dim=8, n_routed_experts=8,
    n_shared_experts=1, num_experts_per_tok=3, routed_scaling_factor=1.5, swiglu_limit=0.5,
    sliding_window=8, num_hidden_layers=4, layer_types=[SLIDING, SPARSE, HEAVY, SPARSE],
    compress_rates={SPARSE: 4, HEAVY: 8}, num_hash_layers=1, o_groups=2, o_lora_rank=16,
    index_n_heads=16, index_head_dim=16, index_topk=3, max_position_embeddings=512,
    rope_scaling={"type": "yarn", "factor": 8, "original_max_position_embeddings": 64,
                  "beta_fast": 32, "beta_slow": 1},
    attn_implementation="eager",
)  # fmt: skip
# transformers' name of a part -> the published one.
RENAMES = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.compressor\.indexer\.scorer\.weights_proj\.", ".indexer.weights_proj."),
    (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.compressor\.kv_proj\.", ".compressor.wkv."),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
    (r"\.compressor\.position_bias$", ".compressor.ape"),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.q_a_proj\.", ".wq_a."),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.q_b_proj\.", ".wq_b."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.o_a_proj\.", ".wo_a."),
    (r"\.o_b_proj\.", ".wo_b."),
    (r"\.sinks$", ".attn_sink"),
    (r"\.self_attn\.", ".attn."),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.mlp\.", ".ffn."),
)


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    """`input_ids` [2, L], `logits` [2, L, V] in float64's accuracy, `logits_transformers` and
    `mtp_logits` [2, L - 1, V]."""
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return dict(arrays)


def make_deepseek_v4(folder: Path, *, seed: int = 0, **config: Any) -> Any:
    """Write a random float32 checkpoint with the published names of tensors, and transformers'
    config.json; return the transformers model."""
    import torch
    from safetensors.numpy import save_file
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.set_num_threads(1)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**{**TINY, **config})).eval().float()
    randomise(model, seed)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in model.state_dict().items():
        tensors.update(published(name, value.numpy()))
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    fields = {**model.config.to_dict(), "architectures": ["DeepseekV4ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(fields))
    return model


def randomise(model: Any, seed: int) -> None:
    """Every part: its own initialisation leaves sinks, biases and tables zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(part: Any) -> Any:
        return torch.randn(part.shape, generator=generator)

    with torch.no_grad():
        for name, part in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                experts = model.config.n_routed_experts
                for row in part:
                    row.copy_(torch.randperm(experts, generator=generator)[: len(row)])
            elif name.endswith("e_score_correction_bias"):
                part.copy_(0.3 * normal(part))
            elif "norm" in name:
                part.copy_(1 + 0.3 * normal(part))
            elif name.endswith("scale"):
                part.copy_(0.5 + 0.2 * normal(part))
            elif name.endswith(("base", "position_bias", "sinks")) or "embed" in name:
                part.copy_(normal(part))
            elif name.endswith("fn"):
                part.copy_(0.3 * normal(part))
            elif part.dtype.is_floating_point and "inv_freq" not in name:
                part.copy_(1.5 * normal(part) / part.shape[-1] ** 0.5)


def published(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """One of transformers' tensors as the published checkpoints have it."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    if name.endswith(".experts.gate_up_proj"):
        half = value.shape[1] // 2
        parts = {"w1": value[:, :half], "w3": value[:, half:]}
    elif name.endswith(".experts.down_proj"):
        parts = {"w2": value}
    else:
        return {name: value}
    prefix = name.rpartition(".")[0]
    return {
        f"{prefix}.{e}.{part}.weight": rows[e]
        for part, rows in parts.items()
        for e in range(len(rows))
    }


def logits_of(model: Any, token_ids: list[int]) -> np.ndarray:
    """float32 [L, V], by transformers, the text given whole."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].numpy()
