"""Compressors of DeepSeek-V4: one vector for every few tokens, in which each channel
weighs the tokens by a softmax of its own.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.linear import Linear
from jengine.layers.norm import WideRMSNorm
from jengine.layers.param import param
from jengine.models.deepseek_v4.config import Compression
from jengine.models.deepseek_v4.rotary import Rotation, rotate_tail
from jengine.pallas_kernels.compress_tokens import Pieces
from jengine.pallas_kernels.linear.api import linear


def num_halves(compression: Compression) -> int:
    """Where groups overlap, a token has channels for the next entry and channels for its own."""
    return 2 if compression.is_sparse else 1


class Compressor(nnx.Module):
    """What goes into `compress_tokens`, and what is made of its result. Names are DeepSeek's."""

    def __init__(
        self, dim: int, channels: int, compression: Compression, norm_eps: float, dtype: str
    ) -> None:
        self.ratio, self.channels = compression.ratio, channels
        width = num_halves(compression) * channels
        self.wkv = Linear(dim, width, (None, "embed"), dtype)
        self.wgate = Linear(dim, width, (None, "embed"), dtype)
        self.ape = param((compression.ratio, width), (None, None), "float32", init="zeros")
        self.norm = WideRMSNorm(channels, norm_eps, dtype, axis="head_dim")

    def project(
        self, x_TD: jax.Array, positions_T: jax.Array, num_tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(values, scores), float32 [T, halves, channels]. A score depends on the token's place in
        its group."""
        values_TW, gates_TW = (
            linear(x_TD, part.weight[...], num_tokens=num_tokens, out_dtype=jnp.float32)
            for part in (self.wkv, self.wgate)
        )
        scores_TW = gates_TW + self.ape[...][positions_T % self.ratio]
        shape = (x_TD.shape[0], -1, self.channels)
        return values_TW.reshape(shape), scores_TW.reshape(shape)

    def finish(self, raw_GH: jax.Array, pieces: Pieces, rotation: Rotation) -> jax.Array:
        """[G, H]: normed, and rotated as the first token of its group."""
        normed_GH = self.norm(raw_GH, jnp.int32(pieces.seq.shape[0]))
        return rotate_tail(normed_GH[:, None], rotation)[:, 0]
