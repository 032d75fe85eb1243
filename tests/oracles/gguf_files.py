"""GGUF files written by the `gguf` library, for tests of our reader."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGUFValueType
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

from tests.oracles.tiny_llama import BOS, CHAT_TEMPLATE, EOS, PAD, train_tiny_tokenizer

QuantType = gguf.GGMLQuantizationType
ARCHITECTURES = {  # transformers' model_type -> llama.cpp's architecture
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
NAMES = {kind: gguf.get_tensor_name_map(arch, 100) for kind, arch in ARCHITECTURES.items()}
NORMAL_TOKEN, CONTROL_TOKEN = 1, 3


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]],
    architecture: str = "llama",
) -> None:
    """Write a file. Tensors are given as the library stores them: numbers for F32 and F16, else
    rows of bytes.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, _value_type(value))
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(
    kind: gguf.GGMLQuantizationType, rows: int, columns: int, seed: int = 0
) -> np.ndarray:
    """Rows of random bytes: every bit pattern of every field of the format, infinities and NaN
    scales included.
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(seed).integers(0, 256, (rows, columns // block * size), np.uint8)


def write_llama_gguf(
    path: Path, model: PreTrainedModel, kind: gguf.GGMLQuantizationType = QuantType.F32
) -> dict[str, np.ndarray]:
    """Convert a transformers model as llama.cpp's converter does, with the tiny tokenizer.

    Returns what each tensor holds in Hugging Face's naming and order of rows, after quantisation.
    """
    config: Any = model.config
    permuted: dict[str, int] = {}  # projection -> heads; the other architectures permute nothing
    if config.model_type == "llama":
        permuted = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors, expected = {}, {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.float().numpy()
        if "gemma" in config.model_type and name.endswith("norm.weight"):
            array = array + 1
        stored_as = QuantType.F32 if array.ndim == 1 else kind
        num_heads = permuted.get(name.split(".")[-2])
        stored = array if num_heads is None else permute(array, num_heads)
        data = quantize(stored, stored_as)
        tensors[gguf_name(name, config.model_type)] = (data, stored_as)
        values = dequantize(data, stored_as)
        expected[name] = values if num_heads is None else undo_permute(values, num_heads)
    metadata = llama_metadata(config)
    rope = full_rope(config)
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = (llama3_divisors(config), QuantType.F32)
    if rope["rope_type"] == "longrope":
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            tensors[f"rope_factors_{length}.weight"] = (factors, QuantType.F32)
    architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]
    write_gguf(path, {**metadata, **tokenizer_metadata()}, tensors, architecture)
    return expected


def llama_metadata(config: Any) -> dict[str, Any]:
    """The keys of a Llama; the others have the same ones and more under their own prefixes."""
    rope = full_rope(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "vocab_size": config.vocab_size,
    }
    if config.model_type != "phi3":
        metadata |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if config.model_type == "gemma3_text":  # rotates whole heads, and its converter says no more
        del metadata["rope.dimension_count"]
    if (window := getattr(config, "sliding_window", None)) is not None:
        metadata["attention.sliding_window"] = window
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(config, name, None)) is not None:
            metadata[name] = cap
    if rope["rope_type"] in ("linear", "yarn"):
        metadata["rope.scaling.type"] = rope["rope_type"]
        metadata["rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        metadata["rope.scaling.original_context_length"] = original
    if config.model_type == "phi3":
        original = config.original_max_position_embeddings
        metadata["rope.scaling.original_context_length"] = original
        stretch = config.max_position_embeddings / original
        if stretch > 1:
            metadata["rope.scaling.attn_factor"] = math.sqrt(
                1 + math.log(stretch) / math.log(original)
            )
    architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]
    return {f"{architecture}.{key}": value for key, value in metadata.items()}


def full_rope(config: Any) -> dict[str, Any]:
    """The rotation of layers without a window, where the two kinds have their own."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def tokenizer_metadata() -> dict[str, Any]:
    """The tiny tokenizer, as the "gpt-2" pre-tokenizer describes it."""
    tokenizer = train_tiny_tokenizer()
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = tokenizer.model.__getstate__()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            CONTROL_TOKEN if token in (PAD, BOS, EOS) else NORMAL_TOKEN for token in tokens
        ],
        "tokenizer.ggml.merges": _merges(merges),
        "tokenizer.ggml.padding_token_id": vocab[PAD],
        "tokenizer.ggml.bos_token_id": vocab[BOS],
        "tokenizer.ggml.eos_token_id": vocab[EOS],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter: the two halves of each head that rotate together, side by side."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def undo_permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Found by permuting row numbers, not by a second formula."""
    order = permute(np.arange(len(rows)), heads)
    result = np.empty_like(rows)
    result[order] = rows
    return result


def llama3_divisors(config: Any) -> np.ndarray:
    """`rope_freqs.weight`, number by number as llama.cpp's converter writes it."""
    rope = config.rope_parameters
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    divisors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / config.head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def gguf_name(name: str, architecture: str = "llama") -> str:
    """Hugging Face's tensor name -> GGUF's, by the library's own table."""
    found = NAMES[architecture].get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise KeyError(name)
    return found


def _merges(state: bytes) -> list[str]:
    merges = json.loads(state)["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _value_type(value: Any) -> GGUFValueType:
    if isinstance(value, int) and not isinstance(value, bool):
        return GGUFValueType.UINT32
    return GGUFValueType.get_type(value)
