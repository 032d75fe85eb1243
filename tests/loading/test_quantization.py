"""What becomes of packed weights: they stay, are unpacked at load, or are refused by name."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jengine.config import EngineConfig, ModelArgs
from jengine.errors import LoadError, UnsupportedError
from jengine.loading.checkpoint import open_checkpoint
from jengine.models.loader import load_parameters, open_model
from jengine.pallas_kernels.packed import FP8_BLOCKS, MXFP4, PackedWeight
from jengine.pallas_kernels.packed_cases import defined_values
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split
from tests.loading.test_block_scales import write_quantised
from tests.models.test_deepseek_v4_checkpoint import FLASH


def test_quantised_parameters_are_those_of_the_values(tmp_path: Path) -> None:
    """A checkpoint in FP8 and FP4, as published, and the same values in float32: packed on the
    device, unpacked at load, and never packed."""
    folders = write_quantised(tmp_path)
    placement = Placement(Split(), (jax.devices()[0],))
    exact, packed, dequantised = (
        load_parameters(
            open_model(EngineConfig.from_kwargs(str(folder), dtype="float32", **options)), placement
        )
        for folder, options in zip(
            (folders[0], folders[1], folders[1]),
            ({}, {"quantization": "fp8"}, {"dequantize": True}),
            strict=True,
        )
    )  # fmt: skip
    assert exact.keys() == dequantised.keys()
    packings = {"e4m3": FP8_BLOCKS, "e2m1": MXFP4}
    for path, value in exact.items():
        np.testing.assert_array_equal(np.asarray(dequantised[path]), np.asarray(value), path)
        if path in packed:
            np.testing.assert_array_equal(np.asarray(packed.pop(path)), np.asarray(value), path)
            continue
        codes, scales = packed.pop(path + ".codes"), packed.pop(path + ".scales")
        packing = packings["e2m1" if ".experts." in path else "e4m3"]
        unpacked = defined_values(PackedWeight(codes, scales, packing))
        np.testing.assert_array_equal(unpacked, np.asarray(value), path)
    assert not packed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "mxfp4"}, "'mxfp4' is not what the checkpoint has"),
        ({"quantization": "fp8", "dequantize": True}, "exclude each other"),
        ({"hf_overrides": {"model_type": "deepseek_v3"}}, "cannot stay packed; dequantize"),
        ({"hf_overrides": {"model_type": "llama"}}, "weights of llama in 'fp8' are not supported"),
        ({"hf_overrides": {"quantization_config": {"quant_method": "awq"}}}, "'awq' are not"),
        ({"hf_overrides": {"quantization_config": None}, "quantization": "fp8"}, "no quantization"),
    ],
)
def test_quantization_that_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLASH))
    with pytest.raises(LoadError, match=message):
        open_checkpoint(ModelArgs(str(tmp_path), load_format="dummy", **options))


def test_other_methods_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="quantization='awq'"):
        ModelArgs("m", quantization="awq")
