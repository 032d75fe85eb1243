"""DeepSeek sparse attention (DeepSeek-V3.2, arXiv:2512.02556): latent attention over the tokens
that a small attention of its own, the indexer, scores highest.

Every token has an index key beside its latent, in the same entry of the cache: the two live and
are found together.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.attention import AttentionMetadata
from jengine.layers.linear import Linear
from jengine.layers.mla import LatentAttention, MLAConfig
from jengine.layers.norm import BiasedLayerNorm
from jengine.pallas_kernels.latent_attention.reference import absorb
from jengine.pallas_kernels.latent_write.api import latent_write
from jengine.pallas_kernels.linear_heads.api import linear_heads
from jengine.pallas_kernels.rotate_and_write.reference import rotate
from jengine.pallas_kernels.select_tokens.api import select_tokens
from jengine.pallas_kernels.sparse_mla_attention.api import sparse_mla_attention

NORM_EPS = 1e-6  # of the norm of index keys


@dataclass(frozen=True)
class IndexConfig:
    """The numbers of the indexer; the defaults are DeepSeek-V3.2's."""

    num_heads: int = 64
    head_dim: int = 128
    top_k: int = 2048  # tokens that a query attends to


class Indexer(nnx.Module):
    """Queries from the latent of the attention's queries, keys and weights of heads from the
    layer's input. The first part of each head rotates. Names are Hugging Face's.
    """

    def __init__(self, dim: int, rank: int, index: IndexConfig, dtype: str) -> None:
        self.index = index
        J, X = index.num_heads, index.head_dim
        self.wq_b = Linear(rank, J * X, (None, None), dtype)
        self.wk = Linear(dim, X, (None, "embed"), dtype)
        self.k_norm = BiasedLayerNorm(X, NORM_EPS, dtype, axis="head_dim")
        # float32 in every model, as in Hugging Face's: a few rows, which decide on which tokens.
        self.weights_proj = Linear(dim, J, (None, "embed"), "float32")

    def keys(
        self, x_TD: jax.Array, num_tokens: jax.Array, rotation: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """[T, X]: what the cache keeps of each token."""
        keys_TX = self.k_norm(self.wk(x_TD, num_tokens), num_tokens)
        return rotate(keys_TX[:, None], *rotation)[:, 0]

    def select(
        self,
        x_TD: jax.Array,
        latent_TR: jax.Array,
        pages_PBE: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
        group: int,
    ) -> jax.Array:
        """Slots i32[T, k] of the tokens to attend to. The pages hold this step's keys already."""
        index, num_tokens = self.index, metadata.num_tokens
        q_TX = self.wq_b(latent_TR, num_tokens)
        q_TJX = q_TX.reshape(q_TX.shape[0], index.num_heads, index.head_dim)
        weights_TJ = self.weights_proj(x_TD.astype(jnp.float32), num_tokens)
        return select_tokens(
            rotate(q_TJX, *rotation),
            weights_TJ * index.num_heads**-0.5,
            pages_PBE,
            metadata.page_tables[group],
            metadata.cu_q_lens,
            metadata.kv_lens,
            metadata.num_seqs,
            top_k=index.top_k,
            scale=index.head_dim**-0.5,
        )


class SparseLatentAttention(LatentAttention):
    """Latent attention over the tokens that its indexer selects."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mla: MLAConfig,
        index: IndexConfig,
        dtype: str,
        *,
        layer: int,
        scale: float,
        bias: bool,
    ) -> None:
        super().__init__(dim, num_heads, mla, dtype, layer=layer, scale=scale, bias=bias)
        self.indexer = Indexer(dim, self.q_rows, index, dtype)

    def parts(
        self,
        x_TD: jax.Array,
        pages_PBE: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (summands of out [P, T, D], pages). The pages are consumed."""
        num_tokens, group = metadata.num_tokens, metadata.group_of_layer[self.layer]
        rows = self.qkv_a_proj(x_TD, num_tokens)
        latent_TR = self.query_latent(rows[:, : self.q_rows], num_tokens)
        entries_TE = self.entries(rows[:, self.q_rows :], num_tokens, rotation)
        index_keys_TX = self.indexer.keys(x_TD, num_tokens, rotation)
        pages_PBE = latent_write(
            pages_PBE,
            jnp.concatenate([entries_TE, index_keys_TX], axis=-1),
            metadata.slots[group],
            num_tokens,
        )
        slots_Tk = self.indexer.select(x_TD, latent_TR, pages_PBE, metadata, rotation, group)
        out_TNC = sparse_mla_attention(
            absorb(self.queries(latent_TR, num_tokens, rotation), self.up_k[...], num_tokens),
            pages_PBE,
            slots_Tk,
            num_tokens,
            value_dim=self.mla.kv_lora_rank,
            scale=self.scale,
        )
        out_TNV = linear_heads(out_TNC, self.up_v[...], num_tokens=num_tokens)
        return self.output(out_TNV, num_tokens), pages_PBE
