"""Write a Llama GGUF as a Hugging Face folder in bf16, for the peers that read no GGUF.

Written with the `gguf` library alone, so that what the peers compute does not rest on our loader.
Token ids go in and come out of every measurement, so the folder needs no tokenizer.

    python benchmarks/peers/export_hf.py MODEL.gguf FOLDER
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def export(source: Path, folder: Path) -> None:
    reader = gguf.GGUFReader(source)
    config = _config(reader)
    tensors = {}
    for tensor in reader.tensors:
        rows = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            rows = _unpair(rows, config["num_attention_heads"])
        elif tensor.name.endswith("attn_k.weight"):
            rows = _unpair(rows, config["num_key_value_heads"])
        tensors[_hf_name(tensor.name)] = np.ascontiguousarray(rows).astype(ml_dtypes.bfloat16)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _config(reader: gguf.GGUFReader) -> dict[str, Any]:
    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base"),
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
        "bos_token_id": reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        "eos_token_id": reader.fields["tokenizer.ggml.eos_token_id"].contents(),
    }


def _hf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest]}"


def _unpair(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of each rotary head; Hugging Face keeps them apart."""
    out, width = rows.shape
    return (
        rows.reshape(num_heads, out // num_heads // 2, 2, width).swapaxes(1, 2).reshape(rows.shape)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    export(args.source, args.folder)
