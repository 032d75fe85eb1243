"""Every tiling of our Triton kernels compiles for an H100, fits, and uses what it should."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

SHARED_BYTES = 227 << 10
HOPPER = 90
SHAPES = [  # (heads, KV heads, head size, dtype)
    (32, 8, 128, "bfloat16"),
    (9, 3, 64, "bfloat16"),
    (64, 8, 64, "bfloat16"),
    (16, 1, 256, "bfloat16"),
    (8, 4, 512, "bfloat16"),
    (32, 32, 80, "bfloat16"),
    (8, 4, 128, "float32"),
]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype"), SHAPES)
@pytest.mark.parametrize("kernel", ["decode_split", "attend_tile", "attend_tile of long prompts"])
def test_attention(
    kernel: str, heads: int, kv_heads: int, head_dim: int, dtype: str, tmp_path: Path
) -> None:
    from jengine.pallas_kernels.ragged_paged_attention import triton_gpu, triton_kernels
    from jengine.pallas_kernels.triton_call import POINTER_OF, compile_kernel

    itemsize = 4 if dtype == "float32" else 2
    data, group = POINTER_OF[dtype], 1 << (heads // kv_heads - 1).bit_length()
    constants = {
        "N": heads, "K": kv_heads, "H": head_dim, "HP": 1 << (head_dim - 1).bit_length(),
        "B": 16, "M": 512, "SCALE": head_dim**-0.5, "SOFT_CAP": 0.0, "HAS_SINKS": False,
        "PRECISION": "ieee", "WIDE": dtype == "float32",
    }  # fmt: skip
    if kernel == "decode_split":
        tiling = triton_gpu.decode_tiling(head_dim, itemsize)
        constants |= {"GP": max(tiling.rows, group), "BLOCK": tiling.block, "NUM_PROGRAMS": 264}
        pointers = (data, data, *["*i32"] * 5, data, data, *["*fp32"] * 3)
    else:
        tokens = triton_gpu.LONG_PROMPT if kernel.endswith("prompts") else 128
        tiling = triton_gpu.tile_tiling(tokens, head_dim, itemsize)
        constants |= {
            "GP": group, "ROWS": max(tiling.rows, group), "BLOCK": tiling.block, "WINDOW": 0,
        }  # fmt: skip
        pointers = (data, data, *["*i32"] * 4, data, data)
    compiled = compile_kernel(
        getattr(triton_kernels, kernel.split()[0]),
        pointers,
        tuple(sorted(constants.items())),
        tiling.schedule,
        HOPPER,
    )
    assert compiled.shared_bytes * tiling.programs_per_multiprocessor <= SHARED_BYTES
    # Keys arrive by asynchronous copies, while the last ones are multiplied.
    assert "cp.async" in compiled.ptx
    if dtype == "bfloat16":
        product = "wgmma.mma_async" if tiling.rows >= 64 else "mma.sync"
        assert product in compiled.ptx
    if head_dim <= 128 and tiling.rows <= 128 and dtype == "bfloat16":
        assert spilled_bytes(compiled.ptx, tmp_path) == 0


def spilled_bytes(ptx: str, folder: Path) -> int:
    from triton import knobs  # pyright: ignore[reportAttributeAccessIssue]

    source = folder / "kernel.ptx"
    source.write_text(ptx)
    done = subprocess.run(
        [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", source, "-o", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    )
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
