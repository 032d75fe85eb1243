"""One text through the live module, outside the engine's cache: for notebooks and tests."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jengine.layers.attention import AttentionMetadata
from jengine.runtime.step import StepSpec


def build_forward(
    spec: StepSpec,
) -> Callable[[tuple[jax.Array, ...], jax.Array, jax.Array], jax.Array]:
    """`forward(params, token_ids i32[T], num_tokens i32[]) -> hidden [T, D]` after the last norm.

    Rows past `num_tokens` are padding. The KV pages are local to the call.
    """
    page_size = spec.groups[0].page_size

    def forward(
        params: tuple[jax.Array, ...], token_ids_T: jax.Array, num_tokens: jax.Array
    ) -> jax.Array:
        T = token_ids_T.shape[0]
        num_pages = -(-T // page_size)
        positions_T = jnp.arange(T, dtype=jnp.int32)
        table_SM = jnp.arange(1, num_pages + 1, dtype=jnp.int32)[None, :]
        slots_T = jnp.where(positions_T < num_tokens, positions_T + page_size, -1)
        num_groups = len(spec.groups)
        metadata = AttentionMetadata(
            positions=positions_T,
            cu_q_lens=jnp.stack([jnp.zeros_like(num_tokens), num_tokens]),
            kv_lens=num_tokens[None],
            num_tokens=num_tokens,
            num_seqs=jnp.int32(1),
            page_tables=(table_SM,) * num_groups,
            slots=(slots_T,) * num_groups,
            group_of_layer=spec.group_of_layer,
        )
        specs = [spec.groups[g].spec for g in spec.group_of_layer]
        kv = tuple(
            jnp.zeros((num_pages + 1, page_size, *s.entry_shape), jnp.dtype(s.dtype)) for s in specs
        )
        hidden_TD, _ = spec.model(params)(token_ids_T, kv, metadata)
        return hidden_TD

    return forward
