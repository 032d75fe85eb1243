"""Packed weights over ranks: scales are cut with their codes, wherever a group ends."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jengine.config import EngineConfig
from jengine.layers.param import abstract_parameters
from jengine.loading.rules import Reader, plan_fills
from jengine.models.loader import ModelDefinition, open_model
from tests.loading.test_block_scales import write_quantised
from tests.loading.test_mxfp4 import write_mxfp4
from tests.models.test_deepseek_v4_checkpoint import FLASH
from tests.oracles.deepseek_v4 import GOLDEN
from tests.sharding.parity import open_driver, serve

TOLERANCE = 1e-5
TP2, EP2 = dict(tensor_parallel_size=2), dict(tensor_parallel_size=2, enable_expert_parallel=True)
GIB = 1 << 30


def open_(folder: Path, **options: Any) -> ModelDefinition:
    return open_model(EngineConfig.from_kwargs(str(folder), max_model_len=64, **options))


def test_flash_fits_two_devices(tmp_path: Path) -> None:
    """All 43 layers, experts and heads shared out: half of the experts' 150.6 GB each."""
    (tmp_path / "config.json").write_text(json.dumps(FLASH))
    model = open_(tmp_path, load_format="dummy", **EP2)
    of_rank = abstract_parameters(model.rank_module)
    num_bytes = sum(info.num_bytes for info in of_rank.values())
    experts = sum(info.num_bytes for path, info in of_rank.items() if ".experts." in path)
    assert experts == 43 * 128 * 3 * 2048 * 4096 * (1 / 2 + 1 / 32)
    assert 73 < num_bytes / GIB < 76
    codes = "layers.5.attn.wo_b.weight.codes"
    assert of_rank[codes].shape == (4096, 4096) and model.cuts[codes].shape == (4096, 8192)


def test_groups_are_not_cut(tmp_path: Path) -> None:
    """The tiny model's output projection has one group of 32 inputs."""
    _, folder = write_quantised(tmp_path)
    with pytest.raises(ValueError, match=r"wo_b\.weight\.codes' has a scale for each 128 bytes"):
        open_(folder, **TP2)
    (tmp_path / "config.json").write_text(json.dumps(FLASH | {"moe_intermediate_size": 1056}))
    with pytest.raises(ValueError, match=r"down_proj\.codes' has a scale for each 16 bytes"):
        open_(tmp_path, load_format="dummy", **TP2)


def test_ranks_read_their_own_codes_and_scales(tmp_path: Path) -> None:
    """By pieces of whole parameters, as ranks' parts are placed."""
    write_mxfp4(tmp_path, num_local_experts=4, intermediate_size=128, num_hidden_layers=1)
    model = open_(tmp_path, **TP2)
    abstract = abstract_parameters(model.module)
    tensors = model.checkpoint.tensors
    assert tensors is not None
    plan = plan_fills(tensors, type(model.module).weight_table(model.cfg, "hf"), abstract)
    for name, axis in (("gate_up_proj", 1), ("down_proj", 2)):
        for part in ("codes", "scales"):
            path = f"layers.0.mlp.experts.{name}.{part}"
            cut, whole = model.cuts[path], Reader(tensors, abstract[path], plan[path])()
            size = whole.shape[axis] // 2
            ranks = []
            for rank in (0, 1):
                index = [slice(0, n) for n in cut.shape]
                index[axis] = slice(rank * size, (rank + 1) * size)
                ranks.append(Reader(tensors, abstract[path], plan[path])(cut.pieces(tuple(index))))
            halves = np.split(whole, 4 if axis == 1 else 2, axis)
            if axis == 1:  # a half of the gate above a half of up
                halves = [np.concatenate(halves[i::2], axis) for i in (0, 1)]
            for got, expected in zip(ranks, halves, strict=True):
                np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.parametrize("mesh", [TP2, EP2], ids=["tp2", "ep2"])
def test_packed_experts_on_ranks(tmp_path: Path, mesh: dict[str, Any]) -> None:
    write_mxfp4(tmp_path, num_local_experts=4, intermediate_size=128)
    tokens, logits = serve(open_driver(tmp_path))
    their_tokens, their_logits = serve(open_driver(tmp_path, **mesh))
    assert np.abs(their_logits - logits).max() <= TOLERANCE
    assert their_tokens == tokens


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.parametrize("mesh", [TP2, EP2], ids=["tp2", "ep2"])
def test_deepseek_v4_on_ranks(mesh: dict[str, Any]) -> None:
    folder = GOLDEN / "tinyA"
    tokens, logits = serve(open_driver(folder))
    their_tokens, their_logits = serve(open_driver(folder, **mesh))
    assert np.abs(their_logits - logits).max() <= TOLERANCE
    assert their_tokens == tokens
