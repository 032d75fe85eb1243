"""`latent_attention` of steps with prompts on NVIDIA GPUs. Among the tokens of a step keys and
values are expanded: a pair of tokens costs a head P + R + V products then, not 2 C + R, three times
as many. Earlier positions are read from the cache, absorbed; so are all of a sequence with one new
token. The two results are joined by their sums.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.latent_attention.reference import absorb
from jengine.pallas_kernels.linear_heads.api import linear_heads
from jengine.pallas_kernels.mla_attention import triton_gpu as mla
from jengine.pallas_kernels.platform import require_cuda
from jengine.pallas_kernels.ragged_paged_attention.work import plan_tiles
from jengine.pallas_kernels.triton_call import Schedule, triton_call


@dataclass(frozen=True, slots=True)
class Tiling:
    """Queries of a tile, keys of a block, and how the kernel is compiled."""

    queries: int
    block: int
    schedule: Schedule


def chunk_tiling(itemsize: int) -> Tiling:
    if itemsize == 4:
        return Tiling(16, 16, Schedule(4, 2))
    return Tiling(128, 64, Schedule(8, 3))


def latent_attention(
    q_TNH: jax.Array,
    entries_TE: jax.Array,
    pages_PBE: jax.Array,
    up_k_NCP: jax.Array,
    up_v_NVC: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    num_tokens: jax.Array,
    *,
    scale: float,
    is_decode: bool = False,
) -> jax.Array:
    (T, N, _), (_, C, P), V = q_TNH.shape, up_k_NCP.shape, up_v_NVC.shape[1]
    if is_decode:
        raise NotImplementedError("decode steps are absorbed: the reference's way")
    if {q_TNH.dtype, entries_TE.dtype} != {up_k_NCP.dtype} or q_TNH.dtype not in mla.DTYPES:
        raise NotImplementedError(f"{q_TNH.dtype} queries, {up_k_NCP.dtype} weights")
    require_cuda()
    from jengine.pallas_kernels.latent_attention.triton_kernels import attend_chunk

    num_seqs = jnp.asarray(num_seqs, jnp.int32)
    prior_TNC, lse_TN = mla.attend(
        absorb(q_TNH, up_k_NCP, num_tokens),
        pages_PBE,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        num_seqs,
        value_dim=C,
        scale=scale,
        earlier_only=True,
    )
    tile = chunk_tiling(q_TNH.dtype.itemsize)
    tiles = plan_tiles(cu_q_lens_S1, kv_lens_S, num_seqs, num_tokens=T, tile_queries=tile.queries)
    R = entries_TE.shape[1] - C
    return triton_call(
        attend_chunk,
        (
            q_TNH,
            _expand("TC,NCP->NTP", entries_TE[:, :C], up_k_NCP),
            entries_TE,
            _expand("TC,NVC->NTV", entries_TE[:, :C], up_v_NVC),
            cu_q_lens_S1,
            tiles.items,
            tiles.num_items,
            lse_TN,
            linear_heads(prior_TNC, up_v_NVC, num_tokens=num_tokens),
        ),
        [jax.ShapeDtypeStruct((T, N, V), q_TNH.dtype)],
        grid=(tiles.items.shape[0] * N,),
        constants={
            "T": T,
            "N": N,
            "P": P,
            "PP": _power_of_two(P),
            "C": C,
            "R": R,
            "RP": _power_of_two(R),
            "V": V,
            "VP": _power_of_two(V),
            "ROWS": tile.queries,
            "BLOCK": tile.block,
            "SCALE": float(scale),
            "PRECISION": "ieee",  # float32 means float32: not TF32, which is Triton's default
        },
        schedule=tile.schedule,
        aliases={8: 0},
    )[0]


def _expand(equation: str, latents_TC: jax.Array, up: jax.Array) -> jax.Array:
    return jnp.einsum(
        equation,
        latents_TC,
        up,
        precision=jax.lax.Precision.HIGHEST if up.dtype == jnp.float32 else None,
        preferred_element_type=up.dtype,
    )


def _power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())
