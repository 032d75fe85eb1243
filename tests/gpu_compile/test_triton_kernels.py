"""Every tiling of our Triton kernels compiles for an H100, fits, and uses what it should."""

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def few_by_default(values: tuple[int, ...], default: set[int]) -> list[Any]:
    """Parameters of which the others are slow: hundreds of small kernels take a minute."""
    return [v if v in default else pytest.param(v, marks=pytest.mark.slow) for v in values]


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
@pytest.mark.parametrize(
    "kernel", ["decode_chunk", "decode_chunk, few columns", "attend_tile", "attend_tile, long"]
)
def test_attention(
    kernel: str, heads: int, kv_heads: int, head_dim: int, dtype: str, tmp_path: Path
) -> None:
    from jengine.pallas_kernels.ragged_paged_attention import triton_gpu, triton_kernels
    from jengine.pallas_kernels.ragged_paged_attention.work import (
        DOUBLINGS,
        MAX_CHUNKS,
        MIN_CHUNK,
    )
    from jengine.pallas_kernels.triton_call import POINTER_OF

    itemsize = 4 if dtype == "float32" else 2
    data, group = POINTER_OF[dtype], 1 << (heads // kv_heads - 1).bit_length()
    constants = {
        "N": heads, "K": kv_heads, "H": head_dim, "HP": 1 << (head_dim - 1).bit_length(),
        "B": 16, "M": 512, "SCALE": head_dim**-0.5, "SOFT_CAP": 0.0, "HAS_SINKS": False,
        "PRECISION": "ieee", "WIDE": dtype == "float32", "MAX_CHUNKS": MAX_CHUNKS,
    }  # fmt: skip
    if kernel.startswith("decode_chunk"):
        tiling = triton_gpu.decode_tiling(head_dim, itemsize)
        constants |= {"GP": max(tiling.rows, group), "BLOCK": tiling.block, "NUM_PROGRAMS": 264}
        few = triton_gpu.MIN_COLUMNS if itemsize == 2 else constants["HP"]
        constants["COLUMNS"] = few if kernel.endswith("columns") else constants["HP"]
        if kernel.endswith("columns"):
            tiling = triton_gpu.alone_tiling(tiling, few, head_dim, itemsize)
        pointers = (data, data, *["*i32"] * 5, data, data, *["*fp32"] * 3)
    else:
        is_long = kernel.endswith("long")
        tiling = triton_gpu.tile_tiling(128, head_dim, itemsize, is_long=is_long)
        constants |= {
            "GP": group, "ROWS": max(tiling.rows, group), "BLOCK": tiling.block, "WINDOW": 0,
            "MIN_CHUNK": MIN_CHUNK, "DOUBLINGS": DOUBLINGS, "IS_LONG": is_long,
        }  # fmt: skip
        pointers = (data, data, *["*i32"] * 4, data, data)
    compiled = compile_for_hopper(
        getattr(triton_kernels, kernel.split(",")[0]), pointers, constants, tiling.schedule
    )
    assert compiled.shared_bytes * tiling.programs_per_multiprocessor <= SHARED_BYTES
    # Keys arrive by asynchronous copies, while the last ones are multiplied.
    assert "cp.async" in compiled.ptx
    if dtype == "bfloat16":
        product = "wgmma.mma_async" if tiling.rows >= 64 else "mma.sync"
        assert product in compiled.ptx
    if head_dim <= 128 and dtype == "bfloat16":
        assert spilled_bytes(compiled.ptx, tmp_path) == 0


TOKENS = (1, 8, 32, 64, 128, 256, 2048, 8192)
PAIR_KERNELS = ("gate_up_of_experts", "down_of_experts")
EXPERTS = [(2048, 768, 8, 128), (2048, 1408, 6, 64), (2880, 2880, 4, 32)]  # D, F, top_k, E


@pytest.mark.parametrize("tokens", few_by_default((1, 8, 32, 64, 128), {1, 128}))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("depth", "outputs"), [(4096, 14336), (576, 1536), (14336, 4096)])
def test_products_of_few_rows(
    tokens: int, gated: bool, depth: int, outputs: int, tmp_path: Path
) -> None:
    from jengine.pallas_kernels.linear import triton_gpu
    from jengine.pallas_kernels.linear.triton_kernels import multiply_rows

    if not gated and tokens > triton_gpu.MAX_ROWS:
        pytest.skip("cuBLASLt's")
    tile = (
        triton_gpu.gated_tiling(tokens, depth)
        if gated
        else triton_gpu.tiling(tokens, outputs, depth)
    )
    assert depth % tile.depth == 0
    constants = {
        "T": tokens, "F": outputs, "D": depth, "BF": tile.outputs, "BT": tile.tokens,
        "BK": tile.depth, "GATED": gated, "STAGES": tile.schedule.num_stages, "HEADS": 1,
        "CODES": "",
    }  # fmt: skip
    compiled = compile_for_hopper(multiply_rows, ("*bf16",) * 4, constants, tile.schedule)
    check_streams(compiled, tmp_path)


# DeepSeek-V4-Flash's: (codes, scales, outputs, depth, heads, gated)
PACKED = [
    ("e4m3", "*u8", 32768, 1024, 1, False),
    ("e4m3", "*u8", 1024, 4096, 1, False),
    ("e4m3", "*u8", 8192, 4096, 8, False),
    ("e4m3", "*fp32", 2048, 7168, 1, True),
    ("e2m1", "*u8", 4096, 2048, 1, False),
]


@pytest.mark.parametrize("tokens", few_by_default((1, 32, 64, 128), {1, 128}))
@pytest.mark.parametrize(("codes", "scales", "outputs", "depth", "heads", "gated"), PACKED)
def test_products_with_packed_weights(
    tokens: int, codes: str, scales: str, outputs: int, depth: int, heads: int, gated: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    from jengine.pallas_kernels.linear import packed_gpu
    from jengine.pallas_kernels.linear.triton_kernels import multiply_rows

    tile = packed_gpu.tiling(tokens, outputs)
    constants = {
        "T": tokens, "F": outputs, "D": depth, "BF": tile.outputs, "BT": tile.tokens,
        "BK": tile.depth, "GATED": gated, "STAGES": tile.schedule.num_stages,
        "HEADS": heads, "CODES": codes,
    }  # fmt: skip
    pointers = ("*bf16", "*u8", scales, "*bf16")
    compiled = compile_for_hopper(multiply_rows, pointers, constants, tile.schedule)
    check_unpacks(compiled, codes, tmp_path)


@pytest.mark.parametrize("tokens", [1, 64, 128])
def test_heads(tokens: int, tmp_path: Path) -> None:
    from jengine.pallas_kernels.linear import triton_gpu
    from jengine.pallas_kernels.linear.triton_kernels import multiply_rows

    tile = triton_gpu.head_tiling(tokens, 4096)
    constants = {
        "T": tokens, "F": 128256, "D": 4096, "BF": tile.outputs, "BT": tile.tokens,
        "BK": tile.depth, "GATED": False, "STAGES": tile.schedule.num_stages,
        "HEADS": 1, "CODES": "",
    }  # fmt: skip
    pointers = ("*bf16", "*bf16", "*bf16", "*fp32")
    check_streams(compile_for_hopper(multiply_rows, pointers, constants, tile.schedule), tmp_path)


@pytest.mark.parametrize("kernel", PAIR_KERNELS)
@pytest.mark.parametrize("tokens", few_by_default(TOKENS, {1, 64, 2048}))
@pytest.mark.parametrize(("embed", "mlp", "top_k", "experts"), EXPERTS)
def test_experts(
    kernel: str, tokens: int, embed: int, mlp: int, top_k: int, experts: int, tmp_path: Path
) -> None:
    from jengine.pallas_kernels.grouped_matmul import triton_gpu

    rows = triton_gpu.tile_rows(tokens, top_k, experts)
    is_down = kernel == PAIR_KERNELS[1]
    tiling = triton_gpu.down_tiling if is_down else triton_gpu.gate_up_tiling
    tile = tiling(rows, tokens * top_k, mlp if is_down else embed, 2)
    assert (mlp if is_down else embed) % tile.depth == 0
    compiled = compile_experts(kernel, tokens, embed, mlp, top_k, rows, tile)
    check_streams(compiled, tmp_path)


# (codes, D, F, top_k, E): of DeepSeek-V4-Flash, gpt-oss, DeepSeek-V3
PACKED_EXPERTS = [
    ("e2m1", 4096, 2048, 6, 256),
    ("e2m1", 2880, 2880, 4, 32),
    ("e4m3", 7168, 2048, 8, 256),
]


@pytest.mark.parametrize("kernel", PAIR_KERNELS)
@pytest.mark.parametrize("tokens", few_by_default((1, 64, 1024, 2048, 8192), {1, 2048}))
@pytest.mark.parametrize(("codes", "embed", "mlp", "top_k", "experts"), PACKED_EXPERTS)
def test_packed_experts(
    kernel: str, tokens: int, codes: str, embed: int, mlp: int, top_k: int, experts: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    from jengine.pallas_kernels.grouped_matmul import triton_gpu

    rows = triton_gpu.tile_rows(tokens, top_k, experts)
    tile = triton_gpu.packed_tiling(rows)
    compiled = compile_experts(kernel, tokens, embed, mlp, top_k, rows, tile, codes)
    check_unpacks(compiled, codes, tmp_path)


def compile_experts(
    kernel: str,
    tokens: int,
    embed: int,
    mlp: int,
    top_k: int,
    rows: int,
    tile: Any,
    codes: str = "",
) -> Any:
    from jengine.pallas_kernels.grouped_matmul import triton_kernels

    is_down = kernel == PAIR_KERNELS[1]
    constants = {
        "D": embed, "F": mlp, "TOP_K": top_k, "BF": tile.outputs, "ROWS": rows, "BK": tile.depth,
        "STAGES": tile.schedule.num_stages, "CODES": codes, "HAS_BIAS": True, "PRECISION": "ieee",
    } | ({"T": tokens} if is_down else {"ALPHA": 1.7, "LIMIT": 7.0, "UP_OFFSET": 1.0})  # fmt: skip
    data, index = "*bf16", "*i32"
    weights = ("*u8", "*u8") if codes else (data, data)
    pointers = (
        (data, *weights, data, "*fp32", index, index, index, "*fp32")
        if is_down
        else (data, *weights, data, index, index, index, data)
    )
    return compile_for_hopper(getattr(triton_kernels, kernel), pointers, constants, tile.schedule)


@pytest.mark.parametrize("heads", [16, 32, 128])
@pytest.mark.parametrize("kernel", ["decode_latent_split", "attend_latent_tile"])
def test_latents(kernel: str, heads: int, tmp_path: Path) -> None:
    from jengine.pallas_kernels.mla_attention import triton_gpu, triton_kernels

    data, index, wide = "*bf16", "*i32", "*fp32"
    constants = {
        "N": heads, "C": 512, "CP": 512, "R": 64, "RP": 64, "B": 16, "M": 512, "SCALE": 0.1,
        "PRECISION": "ieee", "WIDE": False,
    }  # fmt: skip
    if kernel == "decode_latent_split":
        tile = triton_gpu.decode_tiling(heads, 2)
        constants["NUM_PROGRAMS"] = 132
        pointers = (data, data, *[index] * 4, data, data, *[wide] * 3)
    else:
        tile = triton_gpu.tile_tiling(heads, 2)
        constants |= {"ROWS": tile.rows, "EARLIER_ONLY": True}
        pointers = (data, data, *[index] * 4, data, wide)
    constants |= {"HEADS": tile.heads, "BLOCK": tile.block}
    compiled = compile_for_hopper(
        getattr(triton_kernels, kernel), pointers, constants, tile.schedule
    )
    check_streams(compiled, tmp_path, tile.programs_per_multiprocessor)


def test_a_chunk_of_latents(tmp_path: Path) -> None:
    from jengine.pallas_kernels.latent_attention import triton_gpu
    from jengine.pallas_kernels.latent_attention.triton_kernels import attend_chunk

    tile = triton_gpu.chunk_tiling(2)
    constants = {
        "T": 8192, "N": 16, "P": 128, "PP": 128, "C": 512, "R": 64, "RP": 64, "V": 128, "VP": 128,
        "ROWS": tile.queries, "BLOCK": tile.block, "SCALE": 0.1, "PRECISION": "ieee",
    }  # fmt: skip
    data, index = "*bf16", "*i32"
    pointers = (*[data] * 4, *[index] * 3, "*fp32", data, data)
    compiled = compile_for_hopper(attend_chunk, pointers, constants, tile.schedule)
    assert "wgmma.mma_async" in compiled.ptx
    check_streams(compiled, tmp_path)


def compile_for_hopper(
    kernel: Any, pointers: tuple[str, ...], constants: dict[str, Any], schedule: Any
) -> Any:
    from jengine.pallas_kernels.triton_call import compile_kernel

    return compile_kernel(kernel, pointers, tuple(sorted(constants.items())), schedule, HOPPER)


def check_streams(compiled: Any, folder: Path, programs: int = 1) -> None:
    """It fits, spills nothing, and what it multiplies next arrives meanwhile."""
    assert compiled.shared_bytes * programs <= SHARED_BYTES
    assert "cp.async" in compiled.ptx
    assert "mma" in compiled.ptx
    assert spilled_bytes(compiled.ptx, folder) == 0


def check_unpacks(compiled: Any, codes: str, folder: Path) -> None:
    """As above; what is unpacked goes into the warpgroup's product from registers, without a way
    through shared memory."""
    check_streams(compiled, folder)
    assert "wgmma.mma_async" in compiled.ptx
    assert ("mul.bf16x2" if codes == "e2m1" else "cvt.rn.f16x2.e4m3x2") in compiled.ptx
    assert "ldmatrix" not in compiled.ptx


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
