"""GGUF files: header against the `gguf` library's reader, tensors bit for bit against its
dequantisation.
"""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from jengine.errors import LoadError
from jengine.loading.gguf_source import TENSOR_TYPES, GGUFFile, GGUFSource
from tests.oracles.gguf_files import QuantType, random_blocks, write_gguf

ROWS, COLUMNS = 9, 512
REQUIRED = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
PLAIN = {"F32": np.float32, "F16": np.float16}


def stored(kind: gguf.GGMLQuantizationType, columns: int = COLUMNS) -> np.ndarray:
    if kind.name in PLAIN:
        return np.random.default_rng(1).standard_normal((ROWS, columns)).astype(PLAIN[kind.name])
    return random_blocks(kind, ROWS, columns)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales overflow, on both sides
@pytest.mark.parametrize("name", REQUIRED)
def test_every_type_and_slice_equals_the_gguf_library(tmp_path: Path, name: str) -> None:
    kind = QuantType[name]
    data = stored(kind)
    write_gguf(
        tmp_path / "x.gguf",
        {},
        {"before": (stored(QuantType.F16), QuantType.F16), "x": (data, kind)},
    )
    source = GGUFSource(GGUFFile(tmp_path / "x.gguf"))
    expected = dequantize(data, kind)
    assert source.shape("x") == (ROWS, COLUMNS)
    assert_same_bits(source.read("x"), expected)
    for rows in (slice(0, 1), slice(3, 7), slice(ROWS - 1, ROWS), slice(4, None)):
        assert_same_bits(source.read("x", rows), expected[rows])


def test_exactly_the_required_types_are_read(tmp_path: Path) -> None:
    assert {kind.name for kind in TENSOR_TYPES} == set(REQUIRED)
    kind = QuantType.IQ4_NL
    write_gguf(tmp_path / "x.gguf", {}, {"odd": (random_blocks(kind, 2, 32), kind)})
    with pytest.raises(LoadError, match="tensor 'odd' has type IQ4_NL; supported: BF16, F16"):
        GGUFFile(tmp_path / "x.gguf")


def test_vectors_and_more_axes(tmp_path: Path) -> None:
    vector = np.arange(5, dtype=np.float32)
    cube = np.random.default_rng(0).standard_normal((4, 3, 64)).astype(np.float32)
    tensors = {
        "vector": (vector, QuantType.F32),
        "cube": (quantize(cube, QuantType.Q8_0), QuantType.Q8_0),
    }
    write_gguf(tmp_path / "x.gguf", {}, tensors)
    source = GGUFSource(GGUFFile(tmp_path / "x.gguf"))
    assert_same_bits(source.read("vector", slice(1, 4)), vector[1:4])
    expected = dequantize(quantize(cube, QuantType.Q8_0), QuantType.Q8_0)
    assert source.shape("cube") == cube.shape
    assert_same_bits(source.read("cube", slice(1, 3)), expected[1:3])


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    metadata = {
        "a.string": "häßlich 世界",
        "a.empty": "",
        "a.uint": 7,
        "a.float": 0.5,
        "a.true": True,
        "a.strings": ["x", "", "世"],
        "a.ints": [1, -2, 3],
        "a.floats": [0.25, -1.5],
        "a.bools": [True, False],
    }
    write_gguf(tmp_path / "x.gguf", metadata, {"x": (np.ones(3, np.float32), QuantType.F32)})
    read = GGUFFile(tmp_path / "x.gguf").metadata
    assert {key: read[key] for key in metadata} == metadata
    assert read["general.architecture"] == "llama"


def test_the_demo_model_equals_the_gguf_library(smollm2_gguf: Path) -> None:
    reader = gguf.GGUFReader(smollm2_gguf)
    file = GGUFFile(smollm2_gguf)
    source = GGUFSource(file)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):  # the library lists the file's counts as fields
            assert file.metadata[key] == field.contents(), key
    assert list(source.names()) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors[:16]:
        expected = dequantize(tensor.data, tensor.tensor_type)
        assert source.shape(tensor.name) == expected.shape
        assert_same_bits(source.read(tensor.name), expected)


def test_files_that_are_cut_or_not_gguf_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {"a.b": [1, 2]}, {"x": (np.ones((8, 64), np.float32), QuantType.F32)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(LoadError, match="tensor 'x' ends beyond the end"):
        GGUFFile(path)
    for size in (0, 3, 8, 20, 60, 90):
        path.write_bytes(whole[:size])
        with pytest.raises(
            LoadError, match=r"x\.gguf (is not a readable GGUF file|cannot be read)"
        ):
            GGUFFile(path)
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(LoadError, match="does not start with 'GGUF'"):
        GGUFFile(path)
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(LoadError, match="version 1 is not supported"):
        GGUFFile(path)


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_never_escapes_as_another_error(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path / "x.gguf"
    write_gguf(path, {"a.b": ["x", "y"], "a.c": 3}, {"x": (np.ones(64, np.float32), QuantType.F32)})
    data = bytearray(path.read_bytes())
    for _ in range(4):
        data[rng.integers(4, 200)] = rng.integers(256)
    path.write_bytes(data)
    try:
        GGUFFile(path)
    except LoadError as error:
        assert str(path) in str(error) or "tensor" in str(error)
