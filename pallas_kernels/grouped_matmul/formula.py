"""`expert_parts` as every expert's MLP of every token, which can be differentiated (see
`dispatch.py`): its cost grows with all experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jengine.pallas_kernels.grouped_matmul.activation import ClampedSwiGLU
from jengine.pallas_kernels.linear.api import linear
from jengine.pallas_kernels.packed import Weight
from jengine.pallas_kernels.silu_mul.api import silu_mul


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
    del num_experts  # ids of other ranks' experts are nobody's here
    (T, D), E = x_TD.shape, gate_up_EFD.shape[0]

    @jax.checkpoint
    def of_expert(expert: jax.Array) -> jax.Array:
        def take(of_all: Any) -> Any:
            return jax.tree.map(lambda x: x[expert], of_all)

        gate_up_TF = linear(x_TD, take(gate_up_EFD), take(gate_up_bias_EF))
        product_TF = silu_mul(gate_up_TF) if activation is None else activation(gate_up_TF)
        y_TD = linear(product_TF, take(down_EDF), take(down_bias_ED), out_dtype=jnp.float32)
        is_chosen_Tk = expert_ids_Tk == expert
        weight_T = jnp.sum(jnp.where(is_chosen_Tk, weights_Tk, 0.0), axis=1)
        return weight_T[:, None] * y_TD

    def add(out_TD: jax.Array, expert: jax.Array) -> tuple[jax.Array, None]:
        return out_TD + of_expert(expert), None

    out_TD, _ = lax.scan(add, jnp.zeros((T, D), jnp.float32), jnp.arange(E, dtype=jnp.int32))
    is_real_T = jnp.arange(T, dtype=jnp.int32) < num_tokens
    return jnp.where(is_real_T[:, None], out_TD, 0.0).astype(x_TD.dtype)[None]
