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
NAMES = {
    "llama": gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 100),
    "qwen3": gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 100),
}
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
    """Convert a transformers Llama or Qwen3 as llama.cpp's converter does, with the tiny tokenizer.

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
        stored_as = QuantType.F32 if array.ndim == 1 else kind
        num_heads = permuted.get(name.split(".")[-2])
        stored = array if num_heads is None else permute(array, num_heads)
        data = quantize(stored, stored_as)
        tensors[gguf_name(name, config.model_type)] = (data, stored_as)
        values = dequantize(data, stored_as)
        expected[name] = values if num_heads is None else undo_permute(values, num_heads)
    metadata = llama_metadata(config)
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = (llama3_divisors(config), QuantType.F32)
    write_gguf(path, {**metadata, **tokenizer_metadata()}, tensors, config.model_type)
    return expected


def llama_metadata(config: Any) -> dict[str, Any]:
    """The keys of a Llama; a Qwen3 has the same ones under its own prefix."""
    rope = config.rope_parameters
    head_dim = config.head_dim
    metadata = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": rope["rope_theta"],
        "llama.rope.dimension_count": head_dim,
        "llama.vocab_size": config.vocab_size,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        metadata["llama.rope.scaling.type"] = rope["rope_type"]
        metadata["llama.rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        metadata["llama.rope.scaling.original_context_length"] = original
    return {key.replace("llama", config.model_type, 1): v for key, v in metadata.items()}


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
