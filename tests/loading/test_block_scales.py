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
from jengine.loading.block_scales import BlockScaledSource, PackedSource
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


FP8_PARTS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "e_proj", "h_proj")


def write_quantised(folder: Path, name: str = "tinyA") -> tuple[Path, Path]:
    """Two folders with the same model: as published, experts in FP4 and linear maps in FP8; and its
    values in float32."""
    tensors = load_file(GOLDEN / name / "model.safetensors")
    packed, exact = dict(tensors), dict(tensors)
    for name_, weight in tensors.items():
        part = name_.split(".")[-2] if name_.endswith(".weight") else ""
        scale_name = name_.removesuffix(".weight") + ".scale"
        if part in ("w1", "w2", "w3") and ".experts." in name_:
            depth = weight.shape[1]
            padded = np.pad(weight, ((0, 0), (0, -depth % 32)))
            groups = padded.reshape(len(weight), -1, 32)
            exponent = np.ceil(np.log2(np.abs(groups).max(axis=2) / 6)).astype(np.int32)
            codes = (groups / 2.0 ** exponent[..., None]).astype(ml_dtypes.float4_e2m1fn)
            values = codes.astype(np.float32) * np.exp2(exponent[..., None], dtype=np.float32)
            exact[name_] = np.ascontiguousarray(values.reshape(padded.shape)[:, :depth])
            nibbles = codes.reshape(padded.shape).view(np.uint8)[:, :depth]
            packed[name_] = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(np.int8)
        elif (part in FP8_PARTS and "compressor" not in name_) or ".shared_experts." in name_:
            exponent = np.full([-(-n // 128) for n in weight.shape], -5, np.int32)
            codes = (weight * 32).astype(ml_dtypes.float8_e4m3fn)
            exact[name_] = (codes.astype(np.float32) / 32).astype(np.float32)
            packed[name_] = codes
        else:
            continue
        packed[scale_name] = (exponent + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
    assert len(packed) > len(exact) + 100
    config = json.loads((GOLDEN / name / "config.json").read_text())
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


@pytest.mark.parametrize("scale_dtype", [ml_dtypes.float8_e8m0fnu, np.float32])
def test_packed_tensors_are_bytes_and_a_scale_for_each_row(
    tmp_path: Path, scale_dtype: type
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((300, 200)).astype(ml_dtypes.float8_e4m3fn)
    exponent = rng.integers(-9, 9, (3, 2))
    codes = rng.integers(-128, 128, (5, 24)).astype(np.int8)
    write(
        tmp_path, a__weight=weight, a__scale=(2.0**exponent).astype(scale_dtype),
        b__weight=codes, b__scale=e8m0(*[[127, 126]] * 5), c__weight=np.ones((2, 2), np.float32),
    )  # fmt: skip
    source = PackedSource(SafetensorsSource(tmp_path), has_exponents=True)
    assert sorted(source.names()) == ["a.scale", "a.weight", "b.scale", "b.weight", "c.weight"]
    assert source.shape("a.weight") == (300, 200) and source.shape("a.scale") == (300, 2)
    assert source.shape("b.weight") == (5, 24) and source.shape("b.scale") == (5, 2)
    expected = np.repeat(exponent + 127, 128, axis=0)[:300].astype(np.uint8)
    for rows in (None, slice(127, 129), slice(5, 6), slice(256, 300)):
        at = rows or slice(None)
        for columns in (None, slice(1, 2)):
            got = source.read("a.scale", rows, columns)
            assert got.dtype == np.uint8
            np.testing.assert_array_equal(got, expected[at, columns or slice(None)])
        got = source.read("a.weight", rows, slice(3, 130))
        np.testing.assert_array_equal(got, weight.view(np.uint8)[at, 3:130])
    np.testing.assert_array_equal(source.read("b.weight", slice(1, 3)), codes[1:3].view(np.uint8))
    np.testing.assert_array_equal(source.read("c.weight"), np.ones((2, 2)))


def test_scales_that_are_no_exponents(tmp_path: Path) -> None:
    weight = np.zeros((128, 128), ml_dtypes.float8_e4m3fn)
    write(tmp_path, a__weight=weight, a__scale=np.full((1, 1), 0.3, np.float32))
    plain = PackedSource(SafetensorsSource(tmp_path), has_exponents=False)
    np.testing.assert_array_equal(plain.read("a.scale"), np.full((128, 1), np.float32(0.3)))
    with pytest.raises(LoadError, match=r"'a\.scale' has scales that are no powers of two"):
        PackedSource(SafetensorsSource(tmp_path), has_exponents=True).read("a.scale")
