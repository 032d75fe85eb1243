"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the cache holds one latent a token.

A head's key is `up_k @ latent`, its value `up_v @ latent`; whether these are formed, or queries and
results multiplied instead, is the operation's affair (`latent_attention`).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.layers.attention import AttentionMetadata
from jengine.layers.linear import Linear
from jengine.layers.norm import RMSNorm
from jengine.layers.param import param
from jengine.pallas_kernels.latent_attention.api import latent_attention
from jengine.pallas_kernels.latent_write.api import latent_write
from jengine.pallas_kernels.rotate_and_write.reference import rotate

NORM_EPS = 1e-6  # of the norms of latents, whatever config.json says of the others


@dataclass(frozen=True)
class MLAConfig:
    """The sizes of latents and heads. Field names are Hugging Face's."""

    q_lora_rank: int | None  # None: queries are projected directly
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def entry_dim(self) -> int:
        """Values stored for a token: its latent, and the rotated key that all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim


class LatentAttention(nnx.Module):
    """Attention whose keys and values are all projected from one latent."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mla: MLAConfig,
        dtype: str,
        *,
        layer: int,
        scale: float,
        bias: bool,
    ) -> None:
        """`bias`: of the projections to latents and of the output."""
        self.mla, self.layer, self.scale = mla, layer, scale
        heads_dim, C = num_heads * mla.qk_head_dim, mla.kv_lora_rank
        self.q_rows = mla.q_lora_rank or heads_dim
        rank = mla.q_lora_rank
        # Queries (or their latent), the latent of keys and values, the shared key: side by side.
        # Where ranks split the queries, each has the other two whole.
        axis = "heads" if rank is None else None
        rows = (self.q_rows, mla.entry_dim)
        self.qkv_a_proj = Linear(dim, rows, (axis, "embed"), dtype, bias=bias)
        self.q_a_layernorm = None if rank is None else RMSNorm(rank, NORM_EPS, dtype)
        self.q_b_proj = None if rank is None else Linear(rank, heads_dim, ("heads", None), dtype)
        self.kv_a_layernorm = RMSNorm(C, NORM_EPS, dtype)
        self.up_k = param((num_heads, C, mla.qk_nope_head_dim), ("heads", None, None), dtype)
        self.up_v = param((num_heads, mla.v_head_dim, C), ("heads", None, None), dtype)
        self.o_proj = Linear(num_heads * mla.v_head_dim, dim, ("embed", "heads"), dtype, bias=bias)

    def parts(
        self,
        x_TD: jax.Array,
        pages_PBE: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (summands of out [P, T, D], pages). The pages are consumed."""
        num_tokens = metadata.num_tokens
        group = metadata.group_of_layer[self.layer]
        rows = self.qkv_a_proj(x_TD, num_tokens)
        latent = self.query_latent(rows[:, : self.q_rows], num_tokens)
        entries_TE = self.entries(rows[:, self.q_rows :], num_tokens, rotation)
        pages_PBE = latent_write(pages_PBE, entries_TE, metadata.slots[group], num_tokens)
        out_TNV = latent_attention(
            self.queries(latent, num_tokens, rotation),
            entries_TE,
            pages_PBE,
            self.up_k[...],
            self.up_v[...],
            metadata.page_tables[group],
            metadata.cu_q_lens,
            metadata.kv_lens,
            metadata.num_seqs,
            num_tokens,
            scale=self.scale,
            is_decode=metadata.is_decode,
        )
        return self.output(out_TNV, num_tokens), pages_PBE

    def query_latent(self, rows: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """What queries are projected from; themselves where they have no latent."""
        return rows if self.q_a_layernorm is None else self.q_a_layernorm(rows, num_tokens)

    def queries(
        self, rows: jax.Array, num_tokens: jax.Array, rotation: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """[T, N, H], the last part rotated; of what `query_latent` gave."""
        if self.q_b_proj is not None:
            rows = self.q_b_proj(rows, num_tokens)
        q_TNH = rows.reshape(rows.shape[0], -1, self.mla.qk_head_dim)
        q_TNP, q_TNR = jnp.split(q_TNH, (self.mla.qk_nope_head_dim,), axis=-1)
        return jnp.concatenate([q_TNP, rotate(q_TNR, *rotation)], axis=-1)

    def entries(
        self, rows: jax.Array, num_tokens: jax.Array, rotation: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """[T, E]: what the cache keeps of each token."""
        latent_TC, key_TR = jnp.split(rows, (self.mla.kv_lora_rank,), axis=-1)
        key_TR = rotate(key_TR[:, None], *rotation)[:, 0]
        return jnp.concatenate([self.kv_a_layernorm(latent_TC, num_tokens), key_TR], axis=-1)

    def output(self, out_TNV: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """[P, T, D]: summands of the result, of what each head found."""
        return self.o_proj.parts(out_TNV.reshape(out_TNV.shape[0], -1), num_tokens)
