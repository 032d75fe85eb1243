"""DeepSeek-V4's Triton kernels compile for an H100, fit, and use what they should."""

import importlib.util
from pathlib import Path

import pytest

from tests.gpu_compile.test_triton_kernels import check_streams, compile_for_hopper

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

DATA, INDEX, WIDE = "*bf16", "*i32", "*fp32"


@pytest.mark.parametrize("splits", [1, 2, 64])
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_joint_attention(heads: int, splits: int, tmp_path: Path) -> None:
    from jengine.pallas_kernels.joint_attention import triton_gpu
    from jengine.pallas_kernels.joint_attention.triton_kernels import attend_token

    tile = triton_gpu.tiling(heads, 2)
    constants = {
        "T": 64, "N": heads, "E": 512, "EP": 512, "HEADS": tile.heads, "FIRST_ROW": 512,
        "FIRST_WIDTH": 128, "SECOND_ROW": 640, "SECOND_WIDTH": 512, "BLOCK": tile.block,
        "SPLITS": splits, "MIN_BLOCKS": 2, "SCALE": 512**-0.5, "PRECISION": "ieee", "WIDE": False,
    }  # fmt: skip
    pointers = (DATA, DATA, INDEX, DATA, INDEX, INDEX, WIDE, DATA, WIDE, WIDE, WIDE)
    compiled = compile_for_hopper(attend_token, pointers, constants, tile.schedule)
    assert ("wgmma.mma_async" in compiled.ptx) == (tile.heads >= 64)
    check_streams(compiled, tmp_path)
