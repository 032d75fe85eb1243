"""One Llama as a folder, in several files and as GGUF: the same parameters, in the model's own
layout.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest

from jengine.config import ModelArgs
from jengine.errors import LoadError
from jengine.layers.param import ParamInfo, abstract_parameters
from jengine.loading.checkpoint import Checkpoint, open_checkpoint
from jengine.loading.dummy import dummy_parameters
from jengine.loading.rules import WeightTable, load_parameters
from jengine.models.llama import LlamaForCausalLM
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split
from tests.oracles.gguf_files import QuantType, write_llama_gguf
from tests.oracles.tiny_llama import make_tiny_llama

OPTIONS = {
    "gqa": {},
    "tied": dict(tie_word_embeddings=True),
    "bias": dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1, head_dim=32),
}


def load(path: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(ModelArgs(str(path)))
    table, abstract = declare(checkpoint, dtype)
    assert checkpoint.tensors is not None
    return load_parameters(checkpoint.tensors, table, abstract, lambda path, read: read())


def declare(checkpoint: Checkpoint, dtype: str) -> tuple[WeightTable, Mapping[str, ParamInfo]]:
    cfg = LlamaForCausalLM.config_class.from_hf(
        checkpoint.hf_config, dtype=dtype, kv_dtype=dtype, max_model_len=64
    )
    table = LlamaForCausalLM.weight_table(cfg, checkpoint.dialect)
    return table, abstract_parameters(LlamaForCausalLM(cfg))


def assert_equal(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert list(ours) == list(theirs)
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_format_gives_the_same_parameters(tmp_path: Path, name: str) -> None:
    model = make_tiny_llama(tmp_path / "hf", **OPTIONS[name])
    whole = load(tmp_path / "hf")
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    qkv = [state[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    np.testing.assert_array_equal(whole["layers.1.self_attn.qkv_proj.weight"], np.concatenate(qkv))
    gate_up = [state[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    np.testing.assert_array_equal(
        whole["layers.0.mlp.gate_up_proj.weight"], np.concatenate(gate_up)
    )
    make_tiny_llama(tmp_path / "sharded", max_shard_size="20KB", **OPTIONS[name])
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_equal(load(tmp_path / "sharded"), whole)
    write_llama_gguf(tmp_path / "x.gguf", model)
    assert_equal(load(tmp_path / "x.gguf"), whole)


def test_quantised_gguf_holds_what_dequantising_gives(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "hf")
    expected = write_llama_gguf(tmp_path / "x.gguf", model, QuantType.Q8_0)
    loaded = load(tmp_path / "x.gguf")
    qkv = [expected[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    np.testing.assert_array_equal(loaded["layers.1.self_attn.qkv_proj.weight"], np.concatenate(qkv))
    np.testing.assert_array_equal(loaded["lm_head.weight"], expected["lm_head.weight"])


def test_cast_to_the_declared_dtype(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    full, half = load(tmp_path), load(tmp_path, "bfloat16")
    for path, value in half.items():
        assert value.dtype.name == "bfloat16"
        np.testing.assert_array_equal(value, full[path].astype(value.dtype))


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, attention_bias=True)
    checkpoint = open_checkpoint(ModelArgs(str(tmp_path), hf_overrides={"attention_bias": False}))
    table, abstract = declare(checkpoint, "float32")
    assert checkpoint.tensors is not None
    with pytest.raises(LoadError, match=r"tensor 'model\.layers\.0\.self_attn\.\w_proj\.bias'"):
        load_parameters(checkpoint.tensors, table, abstract, lambda path, read: read())


def test_dummy_fills_every_parameter(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, attention_bias=True)
    checkpoint = open_checkpoint(ModelArgs(str(tmp_path), load_format="dummy"))
    _, abstract = declare(checkpoint, "bfloat16")
    placement = Placement(Split(), (jax.devices()[0],))
    drawn = jax.tree.map(np.asarray, dummy_parameters(abstract, 0, placement))
    assert {path: value.shape for path, value in drawn.items()} == {
        path: info.shape for path, info in abstract.items()
    }
    for path, value in drawn.items():
        if "norm" in path:
            assert (value == 1).all()
        elif path.endswith("bias"):
            assert (value == 0).all()
        else:
            assert value.astype(np.float32).std() == pytest.approx(0.02, rel=0.1)


def test_the_demo_model(smollm2_gguf: Path) -> None:
    loaded = load(smollm2_gguf, "bfloat16")
    assert sum(value.size for value in loaded.values()) == 134_515_008
    assert all(np.isfinite(value[:8].astype(np.float32)).all() for value in loaded.values())
