"""The Pallas Mosaic GPU kernel of ragged paged attention for long prompts on Hopper.

The structure is that of FlashAttention-3 (arXiv:2407.08608): one warpgroup brings keys and values
into shared memory with the bulk copy engine, page by page; two others multiply, a head each, and
take turns: one has the tensor cores while the other computes its softmax.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jengine.pallas_kernels.ragged_paged_attention.mosaic_gpu import BLOCK, HEADS, QUERIES

# Public, but not re-exported in the form that type checkers know.
ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
SWIZZLED = (  # what the tensor cores read
    plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)
STAGES = 2  # blocks in shared memory
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    max_tiles: int
    scale: float


@functools.partial(jax.jit, static_argnames="shape")  # lowered once for all layers: it takes 1.5 s
def attend_tiles(
    q_TNH: jax.Array,
    kv_rows: jax.Array,  # [P * B, 2 K, H]
    page_table_SM: jax.Array,  # with a block of entries to spare
    tiles: jax.Array,  # i32[W * 4]: sequence, first token, its position, context length
    num_tiles: jax.Array,  # i32[1]
    shape: Shape,
) -> jax.Array:
    """[T, N, H]: rows of the listed tiles; other rows are not written."""
    kernel = plgpu.kernel(
        functools.partial(_tile, shape=shape),
        out_type=jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype),
        grid=(shape.heads // HEADS, shape.max_tiles),
        grid_names=("heads", "tile"),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(q_TNH, kv_rows, page_table_SM, tiles, num_tiles)


def _tile(q_ref, kv_ref, table_ref, tiles_ref, num_tiles_ref, out_ref, *, shape: Shape) -> None:
    tile = lax.axis_index("tile")

    @pl.when(tile < num_tiles_ref[0])
    def _() -> None:
        H = shape.head_dim
        dtype = q_ref.dtype
        pages = BLOCK // shape.page_size
        pl.run_scoped(
            functools.partial(
                _tile_body,
                q_ref,
                kv_ref,
                table_ref,
                out_ref,
                tuple(tiles_ref[tile * 4 + i] for i in range(4)),
                shape=shape,
            ),
            plgpu.SMEM((HEADS, QUERIES, H), dtype, transforms=SWIZZLED),
            plgpu.SMEM((STAGES, BLOCK, H), dtype, transforms=SWIZZLED),
            plgpu.SMEM((STAGES, BLOCK, H), dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=pages, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=pages, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=HEADS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=HEADS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=HEADS),
            collective_axes="wg",
        )


def _tile_body(
    q_ref,
    kv_ref,
    table_ref,
    out_ref,
    item,
    q_smem,  # [HEADS, QUERIES, H]
    k_smem,  # [STAGES, BLOCK, H]
    v_smem,  # [STAGES, BLOCK, H]
    k_ready,
    v_ready,
    k_free,
    v_free,
    turn,  # whose the tensor cores are
    *,
    shape: Shape,
) -> None:
    sequence, first_token, first_position, kv_len = item
    wg = lax.axis_index("wg")
    num_blocks = lax.div(first_position + QUERIES + BLOCK - 1, jnp.int32(BLOCK))

    @pl.when(wg < HEADS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        head = lax.axis_index("heads") * HEADS + wg
        _attend(
            q_ref.at[pl.ds(first_token, QUERIES), head],
            out_ref.at[pl.ds(first_token, QUERIES), head],
            q_smem.at[wg],
            (k_smem, v_smem, k_ready, v_ready, k_free, v_free, turn),
            (wg, first_position, kv_len, num_blocks),
            shape,
        )

    @pl.when(wg == HEADS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(lax.axis_index("heads") * HEADS, jnp.int32(shape.heads // shape.kv_heads))
        _bring(
            kv_ref,
            table_ref.at[sequence],
            (k_smem, v_smem, k_ready, v_ready, k_free, v_free),
            (kv_head, num_blocks),
            shape,
        )


def _bring(kv_ref, table_ref, buffers, numbers, shape: Shape) -> None:
    """The copying warpgroup: blocks of keys and values, each as soon as its buffer is free."""
    k_smem, v_smem, k_ready, v_ready, k_free, v_free = buffers
    kv_head, num_blocks = numbers
    B = shape.page_size

    @pl.loop(0, num_blocks)
    def _(block):
        slot = lax.rem(block, jnp.int32(STAGES))
        # Read before the wait. Entries past the end name some page, whose values are cleared.
        pages = [table_ref[lax.div(block * BLOCK, jnp.int32(B)) + i] for i in range(BLOCK // B)]
        for smem, ready, free, entry in (
            (k_smem, k_ready, k_free, kv_head),
            (v_smem, v_ready, v_free, kv_head + shape.kv_heads),
        ):

            @pl.when(block >= STAGES)
            def _(free=free):
                plgpu.barrier_wait(free.at[slot])

            for i, page in enumerate(pages):
                plgpu.copy_gmem_to_smem(
                    kv_ref.at[pl.ds(page * B, B), entry],
                    smem.at[slot, pl.ds(i * B, B)],
                    ready.at[slot],
                )

    # Buffers outlive whoever reads them: see the last ones free.
    @pl.loop(0, jnp.minimum(num_blocks, STAGES))
    def _(slot):
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(v_free.at[slot])


def _attend(q_ref, out_ref, q_smem, shared, numbers, shape: Shape) -> None:
    """A multiplying warpgroup: one head's queries against all blocks."""
    k_smem, v_smem, k_ready, v_ready, k_free, v_free, turn = shared
    wg, first_position, kv_len, num_blocks = numbers
    H, dtype = shape.head_dim, q_ref.dtype
    rows = plgpu.Layout.WGMMA.reduce(1)

    def take_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    q_smem[...] = plgpu.load(q_ref, layout=plgpu.Layout.WGMMA, optimized=False)
    plgpu.commit_smem()
    top = plgpu.layout_cast(jnp.full((QUERIES,), -jnp.inf, jnp.float32), rows)
    total = plgpu.layout_cast(jnp.zeros((QUERIES,), jnp.float32), rows)
    acc = plgpu.layout_cast(jnp.zeros((QUERIES, H), jnp.float32), plgpu.Layout.WGMMA)
    plgpu.barrier_wait(k_ready.at[0])
    pl.when(wg == 1)(take_turns)

    def step(block, carry, *, is_masked: bool):
        acc, top, total = carry
        slot = lax.rem(block, jnp.int32(STAGES))

        def scores(ref):
            plgpu.wgmma(ref, q_smem, k_smem.at[slot].transpose((1, 0)))
            take_turns()
            return ref[...]

        s = pl.run_scoped(scores, ACC((QUERIES, BLOCK), jnp.float32))
        plgpu.barrier_arrive(k_free.at[slot])
        if is_masked:
            iota = functools.partial(
                plgpu.broadcasted_iota, jnp.int32, (QUERIES, BLOCK), layout=plgpu.Layout.WGMMA
            )
            is_seen = iota(0) + first_position >= iota(1) + block * BLOCK
            s = jnp.where(is_seen, s, -jnp.inf)
        to_log2 = shape.scale * LOG2_E
        new_top = jnp.maximum(top, s.max(axis=1) * to_log2)
        decay = jnp.exp2(top - new_top)
        p = jnp.exp2(s * to_log2 - lax.broadcast_in_dim(new_top, s.shape, [0]))
        acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
        total = total * decay + p.sum(axis=1)
        p_half = p.astype(dtype)
        acc, total, new_top, p_half = lax.optimization_barrier((acc, total, new_top, p_half))
        plgpu.barrier_arrive(turn)  # done with the softmax
        plgpu.barrier_wait(v_ready.at[slot])
        if is_masked:
            _clear_rest(v_smem.at[slot], block * BLOCK, kv_len, H)
        plgpu.barrier_wait(turn)

        def next_keys() -> None:
            @pl.when(block + 1 < num_blocks)
            def _():
                plgpu.barrier_wait(k_ready.at[lax.rem(block + 1, jnp.int32(STAGES))])

        acc = add_product(acc, p_half, v_smem.at[slot], meanwhile=next_keys)
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, new_top, total

    whole = lax.div(first_position + 1, jnp.int32(BLOCK))  # blocks that every query sees whole
    carry = (acc, top, total)
    carry = lax.fori_loop(0, whole, functools.partial(step, is_masked=False), carry)
    acc, _, total = lax.fori_loop(whole, num_blocks, functools.partial(step, is_masked=True), carry)
    pl.when(wg == 0)(take_turns)
    acc /= lax.broadcast_in_dim(total, acc.shape, [0])
    out_ref[...] = acc.astype(dtype)


def add_product(acc, p, v_smem, meanwhile):
    """`acc + p @ v`; `meanwhile` runs while the tensor cores do."""

    def multiply(ref):
        plgpu.wgmma(ref, p, v_smem)
        meanwhile()

    return pl.run_state(multiply)(ACC.init(acc))


def _clear_rest(v_smem, first, kv_len, H: int) -> None:
    """Zero the values of slots past the end of the context: they may hold NaN, and no weight of
    zero would hide it.
    """

    @pl.when(first + BLOCK > kv_len)
    def _():
        for half in range(0, BLOCK, 64):
            v_ref = v_smem.at[pl.ds(half, 64)]
            v = plgpu.load(v_ref, layout=plgpu.Layout.WGMMA)
            at = plgpu.broadcasted_iota(jnp.int32, (64, H), 0, layout=plgpu.Layout.WGMMA)
            v_ref[...] = jnp.where(at + (first + half) < kv_len, v, jnp.zeros_like(v))
        plgpu.commit_smem()
