"""The config.json and generation_config.json that a GGUF file's metadata amounts to.

Facts of llama.cpp's `llama` architecture (Llama, Mistral, SmolLM2), for the weight tables in
models/:

    token_embd.weight    [V, D]    blk.{i}.attn_norm.weight    [D]
    output_norm.weight   [D]       blk.{i}.attn_q.weight       [N*H, D]   (rows permuted)
    output.weight        [V, D]    blk.{i}.attn_k.weight       [K*H, D]   (rows permuted)
      (absent when tied)           blk.{i}.attn_v.weight       [K*H, D]
    rope_freqs.weight    [H/2]     blk.{i}.attn_output.weight  [D, N*H]
      (Llama 3 scaling only, f32)  blk.{i}.ffn_norm.weight     [D]
                                   blk.{i}.ffn_gate.weight     [F, D]
    biases: the same names         blk.{i}.ffn_up.weight       [F, D]
      with .bias                   blk.{i}.ffn_down.weight     [D, F]

Shapes are row-major, [out, in], as in Hugging Face. The rows of attn_q and attn_k (and of their
biases) are permuted within each head: the converter stores x.reshape(heads, 2, H/2, D).swapaxes(1,
2), so that the two halves which Hugging Face rotates together lie side by side; x.reshape(heads,
H/2, 2, D).swapaxes(1, 2) undoes it.

The other architectures permute nothing and add to these, or replace some:

    qwen3, gemma3   blk.{i}.attn_q_norm.weight, attn_k_norm.weight [H]
    gemma2, gemma3  blk.{i}.post_attention_norm.weight, post_ffw_norm.weight [D]
    phi3            blk.{i}.attn_qkv.weight [(N+2K)*H, D], ffn_up.weight [2F, D] (gate, then up);
                    rope_factors_long.weight, rope_factors_short.weight [R/2] (LongRoPE only, f32)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jengine.errors import LoadError
from jengine.loading.gguf_families import FAMILIES, LONG_FACTORS, Keys, short
from jengine.loading.gguf_source import GGUFFile, GGUFSource

LLAMA3_ORIGINAL_CONTEXT = 8192  # of every Llama 3; the file does not say
ROPE_FREQS = "rope_freqs.weight"
ROPE_FREQS_TOLERANCE = 1e-4  # relative; the factors are stored as f32
CONTROL_TOKEN = 3  # llama.cpp's llama_token_type
ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")

# GGUF key -> generation_config.json
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def hf_config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """What Hugging Face's config.json would say. Raises `LoadError` naming the key that is missing
    or not supported.
    """
    metadata, tensors = file.metadata, file.tensors
    architecture = metadata.get("general.architecture")
    if architecture not in FAMILIES:
        raise LoadError(
            f"GGUF architecture {architecture!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    if metadata.get("split.count", 1) > 1:
        raise LoadError(
            f"{file.path} is one of {metadata['split.count']} parts: "
            "merge them with llama-gguf-split"
        )
    keys = Keys(metadata, architecture)
    if keys.get("expert_count", 0):
        raise LoadError(
            f"{file.path} is a mixture of experts, which is not supported in GGUF files"
        )
    if "token_embd.weight" not in tensors:
        raise LoadError("tensor 'token_embd.weight' is missing")
    config = _shared_fields(file, keys)
    if (scaling := _rope_scaling(file, keys, config)) is not None:
        config["rope_scaling"] = scaling
    for name in ("bos", "eos", "padding"):
        if (token_id := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config["pad_token_id" if name == "padding" else f"{name}_token_id"] = token_id
    family, source = FAMILIES[architecture], GGUFSource(file)
    for field, key in family.fields.items():
        if (value := keys.get(key, 0)) != 0:  # 0 says that there is no window
            config[field] = value

    def read(name: str) -> np.ndarray | None:
        return source.read(name) if name in tensors else None

    return config | family.derive(keys, config, read)


def _shared_fields(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """What every architecture says by the same keys and tensors."""
    tensors, family = file.tensors, FAMILIES[keys.prefix]
    hidden, heads = keys.need("embedding_length"), keys.need("attention.head_count")
    rotates = keys.get("rope.dimension_count")
    whole = hidden // heads if family.rotates_a_part or rotates is None else rotates
    head_dim = keys.get("attention.key_length", whole)
    if not family.rotates_a_part and rotates not in (None, head_dim):
        raise LoadError(
            f"{keys.prefix}.rope.dimension_count is not the head size {head_dim}: not supported"
        )
    return {
        "architectures": [family.architecture],
        "model_type": keys.prefix,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": keys.need("feed_forward_length"),
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.need("context_length"),
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def generation_config_from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """End-of-sequence ids (end of turn and of message included, as llama.cpp stops at them) and
    sampling defaults.
    """
    config: dict[str, Any] = {
        theirs: short(metadata[ours]) for ours, theirs in _SAMPLING.items() if ours in metadata
    }
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if ends[1] is None:  # as many converters leave it
        ends += [i for i in map(_control_tokens(metadata).get, ENDS_OF_TURN) if i is not None]
    if ids := list(dict.fromkeys(token_id for token_id in ends if token_id is not None)):
        config["eos_token_id"] = ids
    if (bos := metadata.get("tokenizer.ggml.bos_token_id")) is not None:
        config["bos_token_id"] = bos
    return config


def _control_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    tokens, types = (
        metadata.get(f"tokenizer.ggml.{name}") or () for name in ("tokens", "token_type")
    )
    kinds = enumerate(zip(tokens, types, strict=False))
    return {token: i for i, (token, kind) in kinds if kind == CONTROL_TOKEN}


def _rope_scaling(file: GGUFFile, keys: Keys, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if ROPE_FREQS in file.tensors:
        factors = GGUFSource(file).read(ROPE_FREQS)
        original = keys.get("rope.scaling.original_context_length", LLAMA3_ORIGINAL_CONTEXT)
        return llama3_scaling(factors, config["rope_theta"], original)
    if LONG_FACTORS in file.tensors:  # the family reads them
        return None
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
    if kind == "yarn":
        original = keys.get(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if kind not in ("none", "linear"):
        raise LoadError(
            f"{keys.prefix}.rope.scaling.type {kind!r} is not supported; known: none, linear, yarn"
        )
    # Before scaling.type existed, scale_linear alone said it.
    return {"rope_type": "linear", "factor": factor} if factor not in (0.0, 1.0) else None


def llama3_scaling(factors: np.ndarray, theta: float, original: int) -> dict[str, Any]:
    """The parameters of Llama 3's scaling that gave these divisors of the frequencies.

    Between the two borders 1/divisor is linear in original/wavelength, so that the interior points
    give both borders; the file stores only the divisors.
    """
    factors = factors.astype(np.float64)
    frequencies = theta ** -(np.arange(len(factors)) / len(factors))
    turns = original * frequencies / (2 * np.pi)  # original context / wavelength
    factor = float(factors.max())
    inside = (factors > 1 + 1e-6) & (factors < factor * (1 - 1e-6))
    if inside.sum() < 2:
        raise LoadError(
            f"tensor {ROPE_FREQS!r} does not follow Llama 3's scaling, the only one supported"
        )
    smooth = (1 / factors[inside] - 1 / factor) / (1 - 1 / factor)
    slope, intercept = np.polyfit(turns[inside], smooth, 1)
    low, high = -intercept / slope, (1 - intercept) / slope
    scaling = {
        "rope_type": "llama3",
        "factor": short(factor),
        "low_freq_factor": round(float(low), 3),
        "high_freq_factor": round(float(high), 3),
        "original_max_position_embeddings": original,
    }
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if not np.allclose(factors, expected, rtol=ROPE_FREQS_TOLERANCE):
        raise LoadError(
            f"tensor {ROPE_FREQS!r} does not follow Llama 3's scaling, the only one supported"
        )
    return scaling
