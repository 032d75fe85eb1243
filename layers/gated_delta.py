"""Gated DeltaNet (arXiv:2412.06464): linear attention whose memory is one matrix a head. A token
decays it, corrects what it returns for its key, and reads it with its query.
"""

import dataclasses
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.attention import AttentionMetadata
from jengine.layers.linear import Linear
from jengine.layers.norm import RMSNorm
from jengine.layers.param import param
from jengine.pallas_kernels.gated_delta.api import gated_delta, short_conv
from jengine.pallas_kernels.linear.api import linear
from jengine.pallas_kernels.rms_norm.api import rms_norm
from jengine.sharding.split import Split

LENGTH_EPS = 1e-6  # of the squared length of queries and keys, whatever config.json says of norms
STATE_DTYPE, STATE_ITEMSIZE = "float32", 4  # errors of a state add up over the text


@dataclass(frozen=True)
class DeltaConfig:
    """The sizes of a Gated DeltaNet layer. Field names are Hugging Face's, without "linear_"."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_dim: int

    def of_rank(self, split: Split) -> Self:
        """Raises `ValueError` naming a field that does not divide."""
        keys, values = "linear_num_key_heads", "linear_num_value_heads"
        return dataclasses.replace(
            self,
            num_key_heads=split.share_or_copy(self.num_key_heads, "heads", keys),
            num_value_heads=split.share(self.num_value_heads, "heads", values),
        )

    @property
    def key_dim(self) -> int:
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim

    @property
    def state_size(self) -> int:
        """Values of a state: a matrix for each value head, then the inputs that the convolution
        still needs."""
        matrices = self.num_value_heads * self.key_head_dim * self.value_head_dim
        return matrices + (self.conv_kernel_dim - 1) * self.conv_dim


class GatedDeltaNet(nnx.Module):
    """In the place of a decoder layer's attention; its pages are states."""

    def __init__(
        self, dim: int, delta: DeltaConfig, dtype: str, *, layer: int, norm_eps: float
    ) -> None:
        self.delta, self.layer = delta, layer
        N, keys, values = delta.num_value_heads, delta.key_dim, delta.value_dim
        # Queries, keys, values and the gate of the output z; the learning rate b and the decay a.
        self.in_proj_qkvz = Linear(dim, (keys, keys, values, values), ("heads", "embed"), dtype)
        self.in_proj_ba = Linear(dim, (N, N), ("heads", "embed"), dtype)
        channels, width = (keys, keys, values), delta.conv_kernel_dim
        self.conv1d = param((channels, width), ("heads", None), dtype)
        self.decay = param((N,), ("heads",), "float32", init="ones")
        self.dt_bias = param((N,), ("heads",), "float32", init="ones")
        self.norm = RMSNorm(delta.value_head_dim, norm_eps, "float32", axis="head_dim")
        self.out_proj = Linear(values, dim, ("embed", "heads"), dtype)

    def parts(
        self,
        x_TD: jax.Array,
        states_PE: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (summands of out [P, T, D], states). The states are consumed. Positions do not
        rotate: the decay and the convolution order the tokens."""
        del rotation
        T, delta, num_tokens = x_TD.shape[0], self.delta, metadata.num_tokens
        slots_2S = metadata.slots[metadata.group_of_layer[self.layer]]
        qkv_TC, z_TF = jnp.split(self.in_proj_qkvz(x_TD, num_tokens), (delta.conv_dim,), axis=1)
        qkv_TC, states_PE = short_conv(
            qkv_TC, self.conv1d[...], states_PE, slots_2S, metadata.seq_ids, metadata.cu_q_lens
        )
        # Without the barrier XLA:CPU fuses the exponential with the norms of some shapes only.
        qkv_TC = jax.lax.optimization_barrier(jax.nn.silu(qkv_TC))
        q_TF, k_TF, v_TF = jnp.split(qkv_TC, (delta.key_dim, 2 * delta.key_dim), axis=1)
        H = delta.key_head_dim
        log_decay_TN, beta_TN = self.rates(x_TD, num_tokens)
        out_TNV, states_PE = gated_delta(
            unit_heads(q_TF, H, num_tokens) * H**-0.5,
            unit_heads(k_TF, H, num_tokens),
            v_TF.reshape(T, -1, delta.value_head_dim),
            log_decay_TN,
            beta_TN,
            states_PE,
            slots_2S,
            metadata.cu_q_lens,
            is_decode=metadata.is_decode,
        )
        heads = out_TNV.reshape(-1, delta.value_head_dim)
        normed_TF = self.norm(heads, num_tokens * delta.num_value_heads).reshape(T, -1)
        gated_TF = normed_TF * jax.nn.silu(z_TF.astype(jnp.float32))
        return self.out_proj.parts(gated_TF.astype(x_TD.dtype), num_tokens), states_PE

    def rates(self, x_TD: jax.Array, num_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(log decay, learning rate) of each token and value head, float32 [T, N]."""
        ba_TX = linear(
            x_TD, self.in_proj_ba.weight[...], num_tokens=num_tokens, out_dtype=jnp.float32
        )
        b_TN, a_TN = jnp.split(ba_TX, 2, axis=1)
        speed_TN = jax.nn.softplus(a_TN + self.dt_bias[...][None, :])
        return -self.decay[...][None, :] * speed_TN, jax.nn.sigmoid(b_TN)


def unit_heads(x_TF: jax.Array, head_dim: int, num_tokens: jax.Array) -> jax.Array:
    """[T, K, H]: float32 heads scaled to length one, as a norm whose mean is a sum."""
    heads = x_TF.reshape(-1, head_dim)
    scale_H = jnp.full((head_dim,), head_dim**-0.5, jnp.float32)
    num_heads = x_TF.shape[1] // head_dim
    unit = rms_norm(heads, scale_H, eps=LENGTH_EPS / head_dim, num_tokens=num_tokens * num_heads)
    return unit.reshape(x_TF.shape[0], num_heads, head_dim)
