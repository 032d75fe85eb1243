"""Block scales against the definitions of the formats, by hand and by ml_dtypes' own types."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jengine.errors import LoadError
from jengine.loading.block_scales import BlockScaledSource
from jengine.loading.safetensors_source import SafetensorsSource
from tests.oracles.deepseek_v4 import GOLDEN

KINDS = {
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.int8): "I8",
    np.dtype(np.float32): "F32",
    np.dtype(np.int64): "I64",
}


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """By the format's definition: safetensors' own writer does not know these dtypes either."""
    header, data = {}, b""
    for name, value in tensors.items():
        span = [len(data), len(data) + value.nbytes]
        kind = KINDS[value.dtype]
        header[name] = {"dtype": kind, "shape": value.shape, "data_offsets": span}
        data += np.ascontiguousarray(value).tobytes()
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def write(folder: Path, **tensors: np.ndarray) -> BlockScaledSource:
    write_tensors(folder, {name.replace("__", "."): value for name, value in tensors.items()})
    return BlockScaledSource(SafetensorsSource(folder))


def write_quantised(folder: Path) -> tuple[Path, Path]:
    """Two folders with the same model: as published, most of it in FP8, experts' gates and ups in
    FP4; and its values in float32."""
    tensors = load_file(GOLDEN / "tinyA" / "model.safetensors")
    packed, exact = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        scale_name = name.removesuffix(".weight") + ".scale"
        if name.endswith(("w1.weight", "w3.weight")) and ".experts." in name:
            groups = weight.reshape(len(weight), -1, 32)
            exponent = np.ceil(np.log2(np.abs(groups).max(axis=2) / 6)).astype(np.int32)
            codes = (groups / 2.0 ** exponent[..., None]).astype(ml_dtypes.float4_e2m1fn)
            values = codes.astype(np.float32) * np.exp2(exponent[..., None], dtype=np.float32)
            exact[name] = values.reshape(weight.shape)
            nibbles = codes.reshape(weight.shape).view(np.uint8)
            packed[name] = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(np.int8)
            packed[scale_name] = (exponent + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
        elif any(f".{part}.weight" in name for part in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")):
            if "compressor" in name:
                continue
            exponent = np.full([-(-n // 128) for n in weight.shape], -5, np.int32)
            codes = (weight * 32).astype(ml_dtypes.float8_e4m3fn)
            exact[name] = (codes.astype(np.float32) / 32).astype(np.float32)
            packed[name] = codes
            packed[scale_name] = (exponent + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
    assert len(packed) > len(exact) + 100
    config = json.loads((GOLDEN / "tinyA" / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    folders = folder / "exact", folder / "packed"
    for path, content in zip(folders, (exact, packed), strict=True):
        write_tensors(path, content)
        fields = config if content is exact else {**config, "quantization_config": quantization}
        (path / "config.json").write_text(json.dumps(fields))
    return folders


def e8m0(*values: list[int]) -> np.ndarray:
    return np.array(values, np.uint8).view(ml_dtypes.float8_e8m0fnu)


def test_bytes_by_hand(tmp_path: Path) -> None:
    """0x21 is (0.5, 1), 0x53 (1.5, 3), 0xFA (-1, -6); scale 130 is 8, scale 126 a half."""
    packed = np.zeros((2, 32), np.uint8)
    packed[0, :2], packed[1, 16:18] = (0x21, 0x53), (0xFA, 0x07)
    source = write(
        tmp_path, x__weight=packed.view(np.int8), x__scale=e8m0([130, 127], [127, 126])
    )  # fmt: skip
    assert source.names() == ["x.weight"]
    assert source.shape("x.weight") == (2, 64)
    read = source.read("x.weight")
    np.testing.assert_array_equal(read[0, :4], [4, 8, 12, 24])
    np.testing.assert_array_equal(read[1, 32:36], [-0.5, -3, 3, 0])
    assert np.count_nonzero(read) == 7
    np.testing.assert_array_equal(source.read("x.weight", slice(1, 2)), read[1:2])


@pytest.mark.parametrize("scale_dtype", [ml_dtypes.float8_e8m0fnu, np.float32])
def test_blocks_of_fp8_in_any_slice(tmp_path: Path, scale_dtype: type) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((300, 200)).astype(ml_dtypes.float8_e4m3fn)
    scale = (2.0 ** rng.integers(-9, 9, (3, 2))).astype(scale_dtype)
    source = write(tmp_path, a__weight=weight, a__scale=scale, b__scale=np.ones(3, np.float32))
    assert sorted(source.names()) == ["a.weight", "b.scale"]  # the latter is nobody's
    expected = weight.astype(np.float32)
    for i in range(300):
        for j in (0, 1):
            expected[i, 128 * j : 128 * (j + 1)] *= np.float32(scale[i // 128, j])
    for rows in (None, slice(0, 300), slice(127, 129), slice(5, 6), slice(256, 300)):
        np.testing.assert_array_equal(source.read("a.weight", rows), expected[rows or slice(None)])


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    weight = np.zeros((256, 256), ml_dtypes.float8_e4m3fn)
    with pytest.raises(LoadError, match=r"'a\.scale' has shape \(2, 3\)"):
        write(tmp_path, a__weight=weight, a__scale=np.ones((2, 3), np.float32))
