"""How fast weights come onto a mesh from safetensors and from the same model converted.

    python -m benchmarks.convert_load [--repeats 3] [--folder DIR]

Fake devices of one CPU. Files are random, of the names and shapes that a family's table asks for,
and in the page cache both times: what is compared is reading and rearranging, not a disk.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jengine.config import EngineConfig
from jengine.convert import convert
from jengine.layers.param import abstract_parameters
from jengine.loading.rules import EXPERT, LAYER, WeightRule
from jengine.models.loader import load_parameters, open_model
from jengine.sharding.placement import Placement

FILE_BYTES = 1 << 28
LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], hidden_size=2048, intermediate_size=8192, vocab_size=32000,
    num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=8, hidden_act="silu",
    max_position_embeddings=2048, rms_norm_eps=1e-5, torch_dtype="bfloat16",
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense (Llama)": LLAMA,
    "128 experts (Qwen3-MoE)": LLAMA | dict(
        architectures=["Qwen3MoeForCausalLM"], hidden_size=1024, num_hidden_layers=3,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=384, head_dim=64,
    ),
    "latents (DeepSeek-V3)": LLAMA | dict(
        architectures=["DeepseekV3ForCausalLM"], hidden_size=1024, num_hidden_layers=4,
        num_key_value_heads=32, n_routed_experts=64, n_shared_experts=1, num_experts_per_tok=8,
        n_group=8, topk_group=4, moe_intermediate_size=512, first_k_dense_replace=1, head_dim=64,
        intermediate_size=4096, norm_topk_prob=True, routed_scaling_factor=2.5,
    ),
    "stacked experts, turned at load (gpt-oss)": LLAMA | dict(
        architectures=["GptOssForCausalLM"], hidden_size=1024, intermediate_size=1024, head_dim=64,
        num_hidden_layers=4, num_local_experts=32, num_experts_per_tok=4, sliding_window=128,
        layer_types=["full_attention"] * 4, attention_bias=True,
    ),
}  # fmt: skip
MESHES: dict[str, dict[str, Any]] = {
    "1": {},
    "-tp 4": dict(tensor_parallel_size=4),
    "-tp 4, experts shared out": dict(tensor_parallel_size=4, enable_expert_parallel=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="For about 5 GiB of files; a temporary one.")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    print("model | GiB | mesh | safetensors GiB/s | converted GiB/s | ratio")
    for name, hf_config in MODELS.items():
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            write_checkpoint(folder / "hf", hf_config)
            convert(EngineConfig.from_kwargs(str(folder / "hf")), folder / "converted")
            for mesh, options in MESHES.items():
                if "experts" not in mesh or "num_experts_per_tok" in hf_config:
                    measure(name, folder, mesh, options, arguments.repeats)
        finally:
            shutil.rmtree(folder)


def measure(name: str, folder: Path, mesh: str, options: dict[str, Any], repeats: int) -> None:
    """One after the other in turns, so that a busy machine is so for both."""
    seconds: dict[str, list[float]] = {"hf": [], "converted": []}
    num_bytes = 0
    for _ in range(repeats + 1):
        for kind, times in seconds.items():
            model = open_model(EngineConfig.from_kwargs(str(folder / kind), **options))
            placement = Placement(model.split, tuple(jax.devices()[: model.split.num_ranks]))
            started = time.perf_counter()
            parameters = jax.block_until_ready(load_parameters(model, placement))
            times.append(time.perf_counter() - started)
            del parameters
            abstract = abstract_parameters(model.module)
            num_bytes = sum(info.num_bytes for info in abstract.values())
    hf, converted = (num_bytes / 2**30 / statistics.median(t[1:]) for t in seconds.values())
    figures = f"{hf:5.2f} | {converted:5.2f} | {converted / hf:4.2f}"
    print(f"{name} | {num_bytes / 2**30:.2f} | {mesh} | {figures}", flush=True)


def write_checkpoint(folder: Path, hf_config: dict[str, Any]) -> None:
    """Random tensors in files of some size, with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config))
    config = EngineConfig.from_kwargs(str(folder), load_format="dummy")
    model = open_model(config)
    rng = np.random.default_rng(0)
    index: dict[str, str] = {}
    tensors: dict[str, np.ndarray] = {}

    def flush() -> None:
        file = f"model-{len(set(index.values())):05}.safetensors"
        save_file(tensors, folder / file)
        index.update(dict.fromkeys(tensors, file))
        tensors.clear()

    table = type(model.module).weight_table(model.cfg, "hf")
    shapes = {path: info.shape for path, info in abstract_parameters(model.module).items()}
    for rule in table.rules:
        for source in sources_of(rule, shapes):
            if source not in tensors and source not in index:
                bits = rng.integers(0, 1 << 16, rule.shape, np.uint16) & 0xBFFF  # all finite
                tensors[source] = bits.view(ml_dtypes.bfloat16)
            if sum(t.nbytes for t in tensors.values()) > FILE_BYTES:
                flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def sources_of(rule: WeightRule, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Every tensor that a rule stands for."""
    before, is_layered, after = rule.target.partition(LAYER)
    for path, shape in shapes.items():
        layer = path[len(before) : len(path) - len(after)] if is_layered else ""
        if path != rule.target.replace(LAYER, layer) or bool(is_layered) != layer.isdecimal():
            continue
        for expert in range(shape[0]) if EXPERT in rule.source else (0,):
            yield rule.source.replace(LAYER, layer).replace(EXPERT, str(expert))


if __name__ == "__main__":
    main()
