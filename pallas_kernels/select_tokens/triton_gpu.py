"""The choice of tokens on NVIDIA GPUs (`triton_kernels.py`): one kernel scores, one or two choose.

Nothing is sorted. A row of ranks that is too long for one program is cut into chunks, each of which
nominates k; these few go through the same once more.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jengine.pallas_kernels.platform import require_cuda
from jengine.pallas_kernels.ragged_paged_attention.triton_gpu import programs_at_once
from jengine.pallas_kernels.triton_call import Schedule, triton_call

DTYPES = ("bfloat16", "float16", "float32")
MAX_HEADS, MAX_DIM, MAX_TOP_K = 128, 256, 4096
FEW_TOKENS = 64  # as many are scored one by one, as those of a decode step are
TILE_QUERIES = 16  # of a longer step's tiles, which read a key once
MAX_RANKS = 1 << 24  # that wait in memory at a time, 64 MiB
MAX_PLACED = 4096  # ranks that are placed at a time
LAUNCH = 2048  # ranks that are counted while another kernel starts


@dataclass(frozen=True, slots=True)
class Tiling:
    """Keys of a block, and compilation."""

    block: int
    schedule: Schedule
    programs_per_multiprocessor: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How a row of ranks is cut: `chunks` of `chunk`; `candidates` are what all of them nominate,
    rounded up to a power of two, 0 where one chunk is all."""

    chunk: int
    chunks: int
    candidates: int

    @classmethod
    def of(cls, length: int, top_k: int) -> "Cut":
        """The cut whose programs, one after the other, hold the fewest ranks."""
        whole = power_of_two(length)
        cuts, chunk = [cls(whole, 1, 0)], whole // 2
        while chunk >= 2 * top_k:
            chunks = -(-length // chunk)
            cuts.append(cls(chunk, chunks, power_of_two(chunks * top_k)))
            chunk //= 2
        return min(cuts, key=lambda cut: cut.chunk + cut.candidates + LAUNCH * (cut.chunks > 1))


def tiling(itemsize: int) -> Tiling:
    if itemsize == 4:
        return Tiling(32, Schedule(4, 2), 1)
    return Tiling(128, Schedule(4, 3), 2)


def schedule_of(num_ranks: int) -> Schedule:
    """Of a program that holds so many."""
    return Schedule(4 if num_ranks <= 2048 else 8 if num_ranks <= 16384 else 16, 1)


def select_tokens(
    q_TJX: jax.Array,
    weights_TJ: jax.Array,
    pages_PBE: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    top_k: int,
    scale: float,
    tokens_per_entry: int = 1,
) -> jax.Array:
    (T, J, X), M = q_TJX.shape, page_table_SM.shape[1]
    length = M * pages_PBE.shape[1]
    k = min(top_k, length)
    if q_TJX.dtype not in DTYPES or pages_PBE.dtype not in DTYPES:
        raise NotImplementedError(f"{q_TJX.dtype} queries, {pages_PBE.dtype} pages")
    if J > MAX_HEADS or X > MAX_DIM or k > MAX_TOP_K:
        raise NotImplementedError(f"{J} heads of {X}, the best {k}")
    require_cuda()
    few = max(FEW_TOKENS, page_table_SM.shape[0])
    size = TILE_QUERIES if few < T else 1
    tiles_W4 = plan_tiles(cu_q_lens_S1, kv_lens_S, num_seqs, num_tokens=T, size=size)
    at_once = max(1, min(tiles_W4.shape[0], MAX_RANKS // (size * length)))

    def choose(tiles_W4: jax.Array, prior_Tk: jax.Array | None) -> jax.Array:
        return _choose(
            q_TJX, weights_TJ, pages_PBE, page_table_SM, tiles_W4, prior_Tk,
            top_k=k, size=size, scale=scale, tokens_per_entry=tokens_per_entry,
        )  # fmt: skip

    turns = -(-tiles_W4.shape[0] // at_once)
    if turns == 1:
        return choose(tiles_W4, None)
    padded_W4 = jnp.pad(tiles_W4, ((0, -tiles_W4.shape[0] % at_once), (0, 0)))
    return lax.fori_loop(
        0,
        turns,
        lambda i, slots_Tk: choose(
            lax.dynamic_slice_in_dim(padded_W4, i * at_once, at_once), slots_Tk
        ),
        jnp.full((T, k), -1, jnp.int32),
    )


def plan_tiles(
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    num_tokens: int,
    size: int,
) -> jax.Array:
    """Tiles of at most `size` consecutive tokens of a sequence; i32[W, 4]: sequence, first token,
    number of tokens, position of the first. Those past the last have no tokens.
    """
    S = kv_lens_S.shape[0]
    lens_S = jnp.diff(cu_q_lens_S1)
    is_real_S = jnp.arange(S, dtype=jnp.int32) < num_seqs
    stops_S = jnp.cumsum(jnp.where(is_real_S, -(-lens_S // size), 0), dtype=jnp.int32)
    tile_W = jnp.arange(num_tokens if size == 1 else num_tokens // size + S, dtype=jnp.int32)
    sequence_W = jnp.sum(stops_S[None, :-1] <= tile_W[:, None], axis=1, dtype=jnp.int32)
    first_W = (tile_W - jnp.append(0, stops_S)[sequence_W]) * size
    count_W = jnp.minimum(lens_S[sequence_W] - first_W, size)
    start_W = (kv_lens_S - lens_S)[sequence_W]
    return jnp.stack(
        [
            sequence_W,
            cu_q_lens_S1[sequence_W] + first_W,
            jnp.where(tile_W < stops_S[-1], count_W, 0),
            start_W + first_W,
        ],
        axis=1,
    )


def _choose(
    q_TJX: jax.Array,
    weights_TJ: jax.Array,
    pages_PBE: jax.Array,
    page_table_SM: jax.Array,
    tiles_W4: jax.Array,
    prior_Tk: jax.Array | None,
    *,
    top_k: int,
    size: int,
    scale: float,
    tokens_per_entry: int,
) -> jax.Array:
    """The slots of the tiles' tokens. Consumes `prior`, which holds those of others."""
    from jengine.pallas_kernels.select_tokens.triton_kernels import (
        choose_of_best,
        choose_of_chunks,
    )

    T, W, k = q_TJX.shape[0], tiles_W4.shape[0], top_k
    B, M = pages_PBE.shape[1], page_table_SM.shape[1]
    length = M * B
    cut = Cut.of(length, k)
    shared = {"B": B, "M": M, "TOKENS_PER_ENTRY": tokens_per_entry, "TOP_K": k, "QUERIES": size}
    ranks = _score(q_TJX, weights_TJ, pages_PBE, page_table_SM, tiles_W4, shared, scale)
    slots_shape = jax.ShapeDtypeStruct((T, k), jnp.int32)
    nominated = (W * size, cut.chunks, k) if cut.chunks > 1 else (1, 1, 1)
    slots_Tk, best_ranks, best = triton_call(
        choose_of_chunks,
        (ranks, page_table_SM, tiles_W4, tiles_W4 if prior_Tk is None else prior_Tk),
        [
            slots_shape,
            jax.ShapeDtypeStruct(nominated, jnp.uint32),
            jax.ShapeDtypeStruct(nominated, jnp.int32),
        ],
        grid=(W * size, cut.chunks),
        constants=shared
        | {
            "LENGTH": length,
            "KP": power_of_two(k),
            "CHUNK": cut.chunk,
            "CHUNKS": cut.chunks,
            "BLOCK": min(cut.chunk, MAX_PLACED),
        },
        schedule=schedule_of(cut.chunk),
        aliases={} if prior_Tk is None else {3: 0},
    )
    if cut.chunks == 1:
        return slots_Tk
    return triton_call(
        choose_of_best,
        (best_ranks, best, page_table_SM, tiles_W4, slots_Tk),
        [slots_shape],
        grid=(W * size,),
        constants=shared
        | {
            "CHUNK": cut.chunk,
            "CHUNKS": cut.chunks,
            "CANDIDATES": cut.candidates,
            "BLOCK": min(cut.candidates, MAX_PLACED),
        },
        schedule=schedule_of(cut.candidates),
        aliases={4: 0},
    )[0]


def _score(
    q_TJX: jax.Array,
    weights_TJ: jax.Array,
    pages_PBE: jax.Array,
    page_table_SM: jax.Array,
    tiles_W4: jax.Array,
    shared: dict[str, int],
    scale: float,
) -> jax.Array:
    """u32[queries of tiles, entries of a context]: the order of the scores."""
    from jengine.pallas_kernels.select_tokens.triton_kernels import score_queries

    (_, J, X), W = q_TJX.shape, tiles_W4.shape[0]
    length = shared["M"] * shared["B"]
    is_wide = q_TJX.dtype != pages_PBE.dtype or q_TJX.dtype == jnp.float32
    tile = tiling(4 if is_wide else q_TJX.dtype.itemsize)
    parts = max(1, min(programs_at_once(tile.programs_per_multiprocessor) // W,
                       -(-length // tile.block)))  # fmt: skip
    return triton_call(
        score_queries,
        (q_TJX, weights_TJ.astype(jnp.float32), pages_PBE, page_table_SM, tiles_W4),
        [jax.ShapeDtypeStruct((W * shared["QUERIES"], length), jnp.uint32)],
        grid=(W, parts),
        constants=shared
        | {
            "J": J,
            "JP": power_of_two(J),
            "X": X,
            "XP": power_of_two(X),
            "ROW": pages_PBE.shape[2],
            "LENGTH": length,
            "BLOCK": tile.block,
            "PARTS": parts,
            "SCALE": float(scale),
            "PRECISION": "ieee",  # float32 means float32: not TF32, which is Triton's default
            "WIDE": is_wide,
        },
        schedule=tile.schedule,
    )[0]


def power_of_two(n: int) -> int:
    """At least a warp's worth."""
    return max(32, 1 << (n - 1).bit_length())
