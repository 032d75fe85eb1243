"""Gated linear units (arXiv:2002.05202): what joins the two halves of a gate and up projection."""

from typing import Literal

import jax
import jax.numpy as jnp

from jengine.layers.linear import Linear
from jengine.pallas_kernels.linear.api import silu_linear
from jengine.pallas_kernels.silu_mul.api import silu_mul

Activation = Literal["silu", "gelu_pytorch_tanh"]  # named as in Hugging Face's `hidden_act`


def gated_linear(
    gate_up_proj: Linear, x_TD: jax.Array, activation: Activation, num_tokens: jax.Array
) -> jax.Array:
    """`activation(gate) * up` of shape [T, F], where `gate_up_proj` gives gate and up side by side:
    computed in float32, rounded once. Rows at or past `num_tokens` are padding.
    """
    if activation == "silu" and gate_up_proj.bias is None:
        return silu_linear(x_TD, gate_up_proj.weight[...], num_tokens=num_tokens)
    gate_up_TF2 = gate_up_proj(x_TD, num_tokens)
    if activation == "silu":
        return silu_mul(gate_up_TF2, num_tokens=num_tokens)
    gate_TF, up_TF = jnp.split(gate_up_TF2.astype(jnp.float32), 2, axis=1)
    return (jax.nn.gelu(gate_TF, approximate=True) * up_TF).astype(gate_up_TF2.dtype)
