"""The lightning indexer over compressed entries: a small attention whose scores choose the entries
that the layer's heads attend to.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.attention import AttentionMetadata
from jengine.layers.linear import Linear
from jengine.layers.sparse_mla import IndexConfig
from jengine.models.deepseek_v4.compressor import Compressor
from jengine.models.deepseek_v4.config import Compression
from jengine.models.deepseek_v4.rotary import Rotation, rotate_tail
from jengine.pallas_kernels.packed import Packing
from jengine.pallas_kernels.select_tokens.api import select_tokens


class Indexer(nnx.Module):
    """Queries come from the latent of the attention's queries, keys from a compressor of its own.
    Names are DeepSeek's."""

    def __init__(
        self,
        dim: int,
        rank: int,
        index: IndexConfig,
        compression: Compression,
        norm_eps: float,
        dtype: str,
        *,
        packing: Packing | None,
    ) -> None:
        self.index, self.ratio = index, compression.ratio
        rows = index.num_heads * index.head_dim
        self.wq_b = Linear(rank, rows, (None, None), dtype, packing=packing)
        # float32 as in V3.2: a few rows, which decide on which entries.
        self.weights_proj = Linear(dim, index.num_heads, (None, "embed"), "float32")
        self.compressor = Compressor(dim, index.head_dim, compression, norm_eps, dtype)

    def select(
        self,
        x_TD: jax.Array,
        latent_TR: jax.Array,
        pages_PBE: jax.Array,
        metadata: AttentionMetadata,
        rotation: Rotation,
        group: int,
    ) -> jax.Array:
        """Slots i32[T, k] of the entries to attend to, whose keys the pages hold already."""
        index, num_tokens = self.index, metadata.num_tokens
        q_TX = self.wq_b(latent_TR, num_tokens)
        q_TJX = q_TX.reshape(q_TX.shape[0], index.num_heads, index.head_dim)
        weights_TJ = self.weights_proj(x_TD.astype(jnp.float32), num_tokens)
        return select_tokens(
            rotate_tail(q_TJX, rotation),
            weights_TJ * index.num_heads**-0.5,
            pages_PBE,
            metadata.page_tables[group],
            metadata.cu_q_lens,
            metadata.kv_lens,
            metadata.num_seqs,
            top_k=index.top_k,
            scale=index.head_dim**-0.5,
            tokens_per_entry=self.ratio,
        )
