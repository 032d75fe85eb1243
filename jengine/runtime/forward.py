"""One text through the live module, outside the engine's cache: for notebooks and tests."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jengine.layers.attention import AttentionMetadata, slot_mapping
from jengine.runtime.step import StepSpec


def build_forward(
    spec: StepSpec,
) -> Callable[[tuple[jax.Array, ...], jax.Array, jax.Array], jax.Array]:
    """`forward(params, token_ids i32[T], num_tokens i32[]) -> hidden [T, D]` after the last norm.

    Rows past `num_tokens` are padding. The KV pages are local to the call.
    """
    page_size = spec.groups[0].page_size
    groups = spec.groups

    def forward(
        params: tuple[jax.Array, ...], token_ids_T: jax.Array, num_tokens: jax.Array
    ) -> jax.Array:
        T = token_ids_T.shape[0]
        num_pages = -(-T // page_size)
        positions_T = jnp.arange(T, dtype=jnp.int32)
        table_SM = jnp.arange(1, num_pages + 1, dtype=jnp.int32)[None, :]
        seq_ids_T = jnp.zeros_like(positions_T)
        first_slots_2S = jnp.array([[-1], [1]], jnp.int32)  # from no state to that of page 1
        metadata = AttentionMetadata(
            positions=positions_T,
            seq_ids=seq_ids_T,
            cu_q_lens=jnp.stack([jnp.zeros_like(num_tokens), num_tokens]),
            kv_lens=num_tokens[None],
            num_tokens=num_tokens,
            num_seqs=jnp.int32(1),
            page_tables=(table_SM,) * len(groups),
            slots=tuple(
                first_slots_2S
                if group.spec.is_state
                else slot_mapping(
                    table_SM,
                    seq_ids_T,
                    positions_T,
                    num_tokens,
                    page_size,
                    group.spec.tokens_per_entry,
                )
                for group in groups
            ),
            group_of_layer=spec.group_of_layer,
        )
        num_used = [2 if group.spec.is_state else num_pages + 1 for group in groups]
        kv = tuple(
            jnp.zeros((num_used[g], *groups[g].page_shape), jnp.dtype(groups[g].spec.dtype))
            for g in spec.group_of_layer
        )
        hidden_TD, _ = spec.model(params)(token_ids_T, kv, metadata)
        return hidden_TD

    return forward
