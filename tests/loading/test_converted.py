"""Converted checkpoints: the bits of the original on any mesh, and of pieces no byte too much."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jengine.config import EngineConfig
from jengine.convert import convert
from jengine.errors import LoadError
from jengine.layers.param import ParamInfo
from jengine.loading import converted
from jengine.loading.converted import ConvertedReader, ConvertedWeights, ConvertedWriter
from jengine.models.loader import load_parameters, open_model
from jengine.sharding.placement import Placement
from jengine.text.tokenizer import Tokenizer

MESHES: tuple[dict[str, Any], ...] = (
    {},
    dict(tensor_parallel_size=4),  # more than heads of keys
    dict(tensor_parallel_size=2, data_parallel_size=2),
)
EXPERT_MESHES: tuple[dict[str, Any], ...] = (
    dict(tensor_parallel_size=4, enable_expert_parallel=True, expert_parallel_size=2),
    dict(tensor_parallel_size=4, enable_expert_parallel=True, enable_eplb=True,
         num_redundant_experts=4),
)  # fmt: skip


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "layers.0.a": rng.normal(size=(13, 7)).astype(ml_dtypes.bfloat16),
        "layers.0.b": rng.normal(size=(3, 5, 4)).astype(np.float32),
        "layers.10.a": rng.normal(size=9).astype(np.float32),
        "norm": np.zeros((2, 3), np.int32),
    }


def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ParamInfo]:
    monkeypatch.setattr(converted, "CHUNK_BYTES", 64)  # several chunks of everything
    writer = ConvertedWriter(folder)
    for path, value in values().items():
        writer.put(path, value)
    writer.close()
    return {
        path: ParamInfo(v.shape, str(v.dtype), (None,) * v.ndim, "zeros")
        for path, v in values().items()
    }


def test_pieces_come_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    infos = written(tmp_path, monkeypatch)
    weights = ConvertedWeights(tmp_path)
    weights.check(infos)
    assert len(list((tmp_path / "weights/layers.0/layers.0.a").iterdir())) > 3
    for path, value in values().items():
        reader = ConvertedReader(weights, path, infos[path])
        assert reader().tobytes() == value.tobytes()
        for pieces in (
            ((slice(1, 2),), *((slice(0, n),) for n in value.shape[1:])),
            tuple((slice(n - 1, n), slice(0, n // 2)) for n in value.shape),
        ):
            expected = value[np.ix_(*(np.r_[along] for along in pieces))]
            got = reader(pieces)
            assert got.dtype == value.dtype and got.tobytes() == expected.tobytes(), path
    as_float = dataclasses.replace(infos["layers.0.a"], dtype="float32")
    got = ConvertedReader(weights, "layers.0.a", as_float)()
    np.testing.assert_array_equal(got, values()["layers.0.a"].astype(np.float32))


def test_orbax_reads_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, monkeypatch)
    layer = ocp.PyTreeCheckpointer().restore(tmp_path / "weights/layers.0")
    for path in ("layers.0.a", "layers.0.b"):
        np.testing.assert_array_equal(layer[path], values()[path])


def test_what_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    infos = written(tmp_path, monkeypatch)
    weights = ConvertedWeights(tmp_path)
    norm = infos["norm"]
    wrong = dataclasses.replace(norm, shape=(3, 3), sections=())
    for abstract, message in (
        (infos | {"more": norm}, "lacks parameter 'more'"),
        ({k: v for k, v in infos.items() if k != "norm"}, "holds an unknown parameter 'norm'"),
        (infos | {"norm": wrong}, r"'norm' has shape \(2, 3\) .*expected \(3, 3\)"),
    ):
        with pytest.raises(LoadError, match=message):
            weights.check(abstract)
    with pytest.raises(LoadError, match="no plain array"):
        ConvertedReader(weights, "norm", wrong)
    chunk = tmp_path / "weights/layers.10/layers.10.a/0"
    chunk.unlink()
    with pytest.raises(LoadError, match=str(chunk)):
        ConvertedReader(weights, "layers.10.a", infos["layers.10.a"])()
    with pytest.raises(LoadError, match="is not empty"):
        ConvertedWriter(tmp_path)
    marker = tmp_path / "jengine.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 99}))
    with pytest.raises(LoadError, match="format 99, this version reads 1"):
        ConvertedWeights(tmp_path)


def placed(model: Path, **options: Any) -> dict[str, jax.Array]:
    definition = open_model(EngineConfig.from_kwargs(str(model), **options))
    devices = tuple(jax.devices()[: definition.split.num_ranks])
    return load_parameters(definition, Placement(definition.split, devices))


def check_equal(original: Path, folder: Path, **options: Any) -> None:
    """On every device."""
    expected, got = placed(original, **options), placed(folder, **options)
    assert got.keys() == expected.keys()
    for path, array in expected.items():
        assert got[path].sharding == array.sharding
        for ours, theirs in zip(
            got[path].addressable_shards, array.addressable_shards, strict=True
        ):
            assert np.asarray(ours.data).tobytes() == np.asarray(theirs.data).tobytes(), path


@pytest.mark.multi_device
def test_a_converted_model_has_the_bits_of_the_original(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    convert(EngineConfig.from_kwargs(str(tiny_llama), dtype="bfloat16"), folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    for mesh in MESHES:
        check_equal(tiny_llama, folder, dtype="bfloat16", **mesh)
    text = "It's 12:30; naïve 世界"
    one, other = (Tokenizer.from_folder(path).encode(text) for path in (tiny_llama, folder))
    assert one == other
    for options, message in (
        (dict(load_format="safetensors"), "is a converted model, but load_format"),
        (dict(hf_overrides={"num_hidden_layers": 3}), "lacks parameter 'layers.2"),
    ):
        with pytest.raises(LoadError, match=message):
            placed(folder, **options)
    with pytest.raises(LoadError, match="is converted already"):
        convert(EngineConfig.from_kwargs(str(folder)), tmp_path / "again")


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.parametrize("family", ["qwen3", "gpt-oss", "deepseek-v3"])
def test_experts_go_to_any_ranks(family: str, tmp_path: Path) -> None:
    make_tiny_llama: Callable[..., Any] = pytest.importorskip(
        "tests.oracles.tiny_llama"
    ).make_tiny_llama
    from tests.models.test_deepseek_parity import V3
    from tests.models.test_moe_parity import GPT_OSS, QWEN3

    cases = {"qwen3": QWEN3, "gpt-oss": GPT_OSS | dict(num_local_experts=8), "deepseek-v3": V3}
    original, folder = tmp_path / "original", tmp_path / "out"
    make_tiny_llama(original, **cases[family])
    convert(EngineConfig.from_kwargs(str(original)), folder)
    for mesh in (*MESHES, *EXPERT_MESHES):
        check_equal(original, folder, **mesh)


@pytest.mark.slow
def test_a_gguf_file_becomes_a_folder(smollm2_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    convert(EngineConfig.from_kwargs(str(smollm2_gguf)), folder)
    check_equal(smollm2_gguf, folder)
    messages = [{"role": "user", "content": "Hello, wörld!"}]
    texts, ids = [], []
    for path in (smollm2_gguf, folder):
        tokenizer = open_model(EngineConfig.from_kwargs(str(path))).checkpoint.load_tokenizer()
        texts.append(tokenizer.apply_chat_template(messages))
        ids.append((tokenizer.encode("Hello <|im_end|> there"), tokenizer.all_special_ids))
    assert texts[0] == texts[1] and ids[0] == ids[1]
