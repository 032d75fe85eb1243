"""Plain-JAX `expert_parts`: a loop over the tiles in use, and so over the experts touched."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jengine.pallas_kernels.grouped_matmul.activation import ClampedSwiGLU
from jengine.pallas_kernels.grouped_matmul.tiles import build_tiles, tile_rows
from jengine.pallas_kernels.linear.api import linear
from jengine.pallas_kernels.packed import Weight
from jengine.pallas_kernels.silu_mul.api import silu_mul

W = TypeVar("W", bound=Weight)


def expert_parts(
    x_TD: jax.Array,
    expert_ids_Tk: jax.Array,
    weights_Tk: jax.Array,
    gate_up_EFD: Weight,
    down_EDF: Weight,
    *,
    num_tokens: jax.Array,
    gate_up_bias_EF: jax.Array | None = None,
    down_bias_ED: jax.Array | None = None,
    activation: ClampedSwiGLU | None = None,
    num_experts: int | None = None,
) -> jax.Array:
    (T, k), E = expert_ids_Tk.shape, gate_up_EFD.shape[0]
    B = tile_rows(T, k, num_experts or E)
    tiles = build_tiles(expert_ids_Tk, E, B, num_tokens)
    token = jnp.pad(tiles.token_M, (0, B))  # the last tile may read past the end

    def run_tile(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tile, y_MD = carry
        start = tiles.start_G[tile]
        rows = tiles.stop_G[tile] - start
        expert = tiles.expert_G[tile]
        x_BD = x_TD[lax.dynamic_slice(token, (start,), (B,))]
        gate_up_BF = linear(
            x_BD,
            _of_expert(gate_up_EFD, expert),
            None if gate_up_bias_EF is None else _of_expert(gate_up_bias_EF, expert),
            num_tokens=rows,
        )
        if activation is None:
            product_BF = silu_mul(gate_up_BF, num_tokens=rows)
        else:
            product_BF = activation(gate_up_BF)
        y_BD = linear(
            product_BF,
            _of_expert(down_EDF, expert),
            None if down_bias_ED is None else _of_expert(down_bias_ED, expert),
            num_tokens=rows,
            out_dtype=jnp.float32,
        )
        # Rows past this tile's last belong to the tiles after it, which overwrite them.
        return tile + 1, lax.dynamic_update_slice(y_MD, y_BD, (start, jnp.zeros_like(start)))

    y_MD = jnp.zeros((T * k + B, x_TD.shape[1]), jnp.float32)
    _, y_MD = lax.while_loop(
        lambda carry: carry[0] < tiles.num_tiles, run_tile, (jnp.zeros((), jnp.int32), y_MD)
    )

    def of_expert(j: int) -> jax.Array:
        y_TD = weights_Tk[:, j : j + 1] * y_MD[tiles.rank_Tk[:, j]]
        if num_experts is None:
            return y_TD
        return jnp.where((expert_ids_Tk[:, j] < E)[:, None], y_TD, 0.0)

    out_TD = of_expert(0)
    for j in range(1, k):  # spelled out: a reduction's order is XLA's to choose
        out_TD = out_TD + of_expert(j)
    is_real_T = jnp.arange(T, dtype=jnp.int32) < num_tokens
    return jnp.where(is_real_T[:, None], out_TD, 0.0).astype(x_TD.dtype)[None]


def _of_expert(weights: W, expert: jax.Array) -> W:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, expert, keepdims=False), weights)
