"""DeepSeek-V4's Triton kernels compile for an H100, fit, and use what they should."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from jengine.pallas_kernels.triton_call import Schedule
from tests.gpu_compile.test_triton_kernels import (
    check_streams,
    compile_for_hopper,
    spilled_bytes,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

DATA, INDEX, WIDE = "*bf16", "*i32", "*fp32"


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("rest", [0, slow(64)])
@pytest.mark.parametrize("splits", [1, slow(2), slow(64)])
@pytest.mark.parametrize("heads", [slow(16), 64, slow(128)])
def test_joint_attention(heads: int, splits: int, rest: int, tmp_path: Path) -> None:
    """Of a window and entries; with `rest`, DeepSeek-V3.2's over latents."""
    from jengine.pallas_kernels.joint_attention import triton_gpu
    from jengine.pallas_kernels.joint_attention.triton_kernels import add_up_splits, attend_token

    tile = triton_gpu.tiling(heads, 2)
    constants = {
        "N": heads, "E": 512, "EP": 512, "R": rest, "RP": 64, "HEADS": tile.heads,
        "FIRST_ROW": 512 + 3 * rest, "FIRST_WIDTH": 128, "SECOND_ROW": 640,
        "SECOND_WIDTH": 0 if rest else 512, "BLOCK": tile.block, "HAS_SINKS": not rest,
        "SPLITS": splits, "MIN_BLOCKS": 2, "SCALE": 512**-0.5, "PRECISION": "ieee", "WIDE": False,
    }  # fmt: skip
    pointers = (DATA, *(DATA, INDEX, INDEX) * 2, WIDE, DATA, WIDE, WIDE, WIDE)
    compiled = compile_for_hopper(attend_token, pointers, constants, tile.schedule)
    assert ("wgmma.mma_async" in compiled.ptx) == (tile.heads >= 64)
    check_streams(compiled, tmp_path)
    if splits > 1:
        sizes = {name: constants[name] for name in ("N", "E", "EP", "SPLITS", "HAS_SINKS")}
        constants = sizes | {"SPLITS_P": splits, "CHUNK": triton_gpu.CHUNK}
        pointers = (WIDE, WIDE, WIDE, WIDE, DATA)
        compiled = compile_for_hopper(add_up_splits, pointers, constants, Schedule(4, 1))
        assert spilled_bytes(compiled.ptx, tmp_path) == 0


@pytest.mark.parametrize("queries", [1, slow(16)])
@pytest.mark.parametrize("row", [640, slow(704)])
def test_scores(row: int, queries: int, tmp_path: Path) -> None:
    from jengine.pallas_kernels.select_tokens import triton_gpu
    from jengine.pallas_kernels.select_tokens.triton_kernels import score_queries

    tile = triton_gpu.tiling(2)
    constants = {
        "J": 64, "JP": 64, "X": 128, "XP": 128, "ROW": row, "B": 32, "M": 1024, "LENGTH": 32768,
        "TOKENS_PER_ENTRY": 4, "TOP_K": 512, "QUERIES": queries, "BLOCK": tile.block, "PARTS": 4,
        "SCALE": 128**-0.5, "PRECISION": "ieee", "WIDE": False,
    }  # fmt: skip
    pointers = (DATA, WIDE, DATA, INDEX, INDEX, "*u32")
    compiled = compile_for_hopper(score_queries, pointers, constants, tile.schedule)
    assert "wgmma.mma_async" in compiled.ptx
    check_streams(compiled, tmp_path, tile.programs_per_multiprocessor)


@pytest.mark.parametrize(
    ("length", "top_k"),
    [
        (32768, 512),
        *(slow(2048, 512), slow(8192, 2048)),
        *(slow(262144, 512), slow(262144, 1024), slow(163840, 2048)),
    ],
)
def test_choices(length: int, top_k: int, tmp_path: Path) -> None:
    """Ranks stay in registers while they are counted."""
    from jengine.pallas_kernels.select_tokens import triton_gpu, triton_kernels

    cut = triton_gpu.Cut.of(length, top_k)
    constants = {
        "B": 32, "M": length // 32, "TOKENS_PER_ENTRY": 4, "TOP_K": top_k, "QUERIES": 1,
        "CHUNK": cut.chunk, "CHUNKS": cut.chunks,
    }  # fmt: skip
    rank = "*u32"
    compiled = compile_for_hopper(
        triton_kernels.choose_of_chunks,
        (rank, INDEX, INDEX, INDEX, INDEX, rank, INDEX),
        constants
        | {
            "LENGTH": length,
            "KP": triton_gpu.power_of_two(top_k),
            "BLOCK": min(cut.chunk, triton_gpu.MAX_PLACED),
        },
        triton_gpu.schedule_of(cut.chunk),
    )
    assert spilled_bytes(compiled.ptx, tmp_path) == 0
    if cut.chunks > 1:
        compiled = compile_for_hopper(
            triton_kernels.choose_of_best,
            (rank, INDEX, INDEX, INDEX, INDEX, INDEX),
            constants
            | {
                "CANDIDATES": cut.candidates,
                "BLOCK": min(cut.candidates, triton_gpu.MAX_PLACED),
            },
            triton_gpu.schedule_of(cut.candidates),
        )
        assert spilled_bytes(compiled.ptx, tmp_path) == 0


@pytest.mark.parametrize("is_decode", [slow(False), True])
@pytest.mark.parametrize(("halves", "channels"), [slow(1, 512), (2, 640)])
def test_compression(halves: int, channels: int, is_decode: bool, tmp_path: Path) -> None:
    from jengine.pallas_kernels.compress_tokens import triton_gpu
    from jengine.pallas_kernels.compress_tokens.triton_kernels import compress_pieces

    constants = {
        "S": 64, "U": halves, "H": channels, "BLOCK": triton_gpu.BLOCK, "IN_PLACE": is_decode,
        "UNROLL": 1 if is_decode else triton_gpu.UNROLL,
    }  # fmt: skip
    pointers = (WIDE, WIDE, WIDE, INDEX, INDEX, WIDE, WIDE)
    compiled = compile_for_hopper(compress_pieces, pointers, constants, Schedule(1, 1))
    assert "ld.global.v4" in compiled.ptx  # a thread's channels at once
    assert spilled_bytes(compiled.ptx, tmp_path) == 0


@pytest.mark.parametrize("width", [4096, slow(7168)])
def test_streams(width: int, tmp_path: Path) -> None:
    from jengine.pallas_kernels.read_streams import triton_gpu, triton_kernels

    sizes = {"T": 64, "R": 24, "RP": 32}
    for tokens in (64, 2048):
        constants = sizes | {
            "X": 4 * width, "ROWS": triton_gpu.project_rows(tokens), "BK": 32, "WIDE": False,
            "CHUNK": width // 8,
        }  # fmt: skip
        project = triton_kernels.project_streams
        compiled = compile_for_hopper(project, (DATA, WIDE, WIDE), constants, Schedule(4, 3))
        assert "tf32" in compiled.ptx
        assert spilled_bytes(compiled.ptx, tmp_path) == 0
    constants = sizes | {
        "C": 4, "CP": 4, "D": width, "DP": 1 << (width - 1).bit_length(), "ITERATIONS": 20,
        "EPS": 1e-6, "NORM_EPS": 1e-6, "CHUNKS": triton_gpu.CHUNKS,
    }  # fmt: skip
    pointers = (DATA, *[WIDE] * 4, DATA, WIDE, WIDE)
    mix = triton_kernels.mix_streams
    compiled = compile_for_hopper(mix, pointers, constants, Schedule(8, 1))
    assert spilled_bytes(compiled.ptx, tmp_path) == 0


def test_norms(tmp_path: Path) -> None:
    from jengine.pallas_kernels.norm_and_rotate.triton_kernels import norm_rows

    constants = {
        "NUM_ROWS": 4096, "N": 64, "H": 512, "HP": 512, "PAIRS": 32, "PP": 32, "ROWS": 4,
        "EPS": 1e-6,
    }  # fmt: skip
    pointers = (DATA, WIDE, WIDE, DATA)
    compiled = compile_for_hopper(norm_rows, pointers, constants, Schedule(4, 1))
    assert spilled_bytes(compiled.ptx, tmp_path) == 0
