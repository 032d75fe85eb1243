"""MXFP4 against the definition of the format, and a gpt-oss whose experts are stored so against
transformers over the same values.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jengine.loading.mxfp4 import Mxfp4Source, dequantise
from tests.oracles.driver import Driver

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def test_equals_the_formats_definition() -> None:
    """Every value with every scale that float32 can hold it with, by ml_dtypes' own types."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 5, 254 // 2, 16), np.uint8)
    scales = np.resize(np.arange(253, dtype=np.uint8), (3, 5, 127))
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(3, 5, 127, 32)
    exact = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    exact *= scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[..., None]
    got = dequantise(blocks.reshape(3, 5, -1), scales)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, exact.reshape(3, 5, -1).astype(np.float32))


class DictSource:
    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> np.ndarray:
        value = self.tensors[name][rows or slice(None)]
        return value if columns is None else value[:, columns]


def test_packed_pairs_look_like_one_tensor() -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (4, 6, 2, 16), np.uint8)
    scales = rng.integers(120, 130, (4, 6, 2)).astype(np.uint8)
    tensors = {"a_blocks": blocks, "a_scales": scales, "b": np.ones(3), "c_blocks": np.ones(2)}
    source = Mxfp4Source(DictSource(tensors))
    assert sorted(source.names()) == ["a", "b", "c_blocks"]
    assert source.shape("a") == (4, 64, 6) and source.shape("b") == (3,)
    whole = source.read("a")
    np.testing.assert_array_equal(
        whole, dequantise(blocks.reshape(4, 6, -1), scales).swapaxes(1, 2)
    )
    np.testing.assert_array_equal(source.read("a", slice(1, 3)), whole[1:3])
    np.testing.assert_array_equal(source.read("a", slice(1, 3), slice(5, 40)), whole[1:3, 5:40])
    np.testing.assert_array_equal(source.read("b"), np.ones(3))


def write_mxfp4(folder: Path, **config: Any) -> Any:
    """A random gpt-oss whose experts are stored so; returns transformers' of the same values."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from safetensors.numpy import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from tests.oracles.tiny_llama import make_tiny_llama

    hf_model = make_tiny_llama(
        folder, family="GptOss", num_experts_per_tok=2, head_dim=16, hidden_size=64,
        attn_implementation="eager", max_position_embeddings=4096 * 32, **config,
    )  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for i, layer in enumerate(hf_model.model.layers):
        for name in EXPERT_WEIGHTS:
            at = f"model.layers.{i}.mlp.experts.{name}"
            experts, columns, rows = tensors.pop(at).shape
            blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
            scales = rng.integers(122, 125, blocks.shape[:-1]).astype(np.uint8)
            tensors |= {at + "_blocks": blocks, at + "_scales": scales}
            values = convert_moe_packed_tensors(
                torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
            )
            getattr(layer.mlp.experts, name).data = values
    save_file(tensors, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(fields))
    return hf_model


@pytest.mark.parametrize("dequantize", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gpt_oss_in_mxfp4_matches_transformers(tmp_path: Path, dequantize: bool) -> None:
    hf_model = write_mxfp4(tmp_path, num_local_experts=3, intermediate_size=96)
    import torch

    ids = np.random.default_rng(1).integers(3, 512, 24).tolist()
    with torch.no_grad():
        expected = hf_model(torch.tensor([ids])).logits[0].numpy()
    driver = Driver(tmp_path, max_model_len=64, dequantize=dequantize)
    assert np.abs(driver.logits(ids, [16, 8]) - expected).max() <= 1e-4
