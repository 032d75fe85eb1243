"""Texts through the live module, outside the engine's cache: for notebooks, training and tests."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jengine.kv_spec import KVSpec
from jengine.layers.attention import AttentionMetadata, slot_mapping
from jengine.layers.sampling import chosen_logprobs
from jengine.pallas_kernels.dispatch import differentiable
from jengine.pallas_kernels.platform import tracing_invariant
from jengine.runtime.step import StepSpec

MIN_TOKENS = 16  # of a padded pass
LOGITS_ROWS = 64  # positions whose logits [rows, V] exist at a time

Leaves = tuple[jax.Array, ...]


def build_forward(spec: StepSpec) -> Callable[[Leaves, jax.Array, jax.Array], jax.Array]:
    """`forward(params, token_ids i32[T], lengths i32[S]) -> hidden [T, D]` after the last norm.

    The texts lie one after the other; a length may be 0, and rows past the last text are padding.
    The KV pages are local to the call.
    """
    page_size, groups = spec.groups[0].page_size, spec.groups

    def forward(params: Leaves, token_ids_T: jax.Array, lengths_S: jax.Array) -> jax.Array:
        T, S = token_ids_T.shape[0], lengths_S.shape[0]
        cu_lens_S1 = jnp.pad(jnp.cumsum(lengths_S, dtype=jnp.int32), (1, 0))
        num_tokens = cu_lens_S1[-1]
        sequences_S = jnp.arange(S, dtype=jnp.int32)
        seq_ids_T = jnp.repeat(sequences_S, lengths_S, total_repeat_length=T)
        positions_T = jnp.arange(T, dtype=jnp.int32) - cu_lens_S1[seq_ids_T]
        tables_SM = _page_tables(lengths_S, T, page_size)
        # From no state to that of a page of each text's own.
        own_S = jnp.where(lengths_S > 0, sequences_S + 1, -1)
        state_slots_2S = jnp.stack([jnp.full_like(own_S, -1), own_S])

        def slots(spec: KVSpec) -> jax.Array:
            if spec.is_state:
                return state_slots_2S
            of_tokens = tables_SM, seq_ids_T, positions_T, num_tokens, page_size
            return slot_mapping(*of_tokens, spec.tokens_per_entry)

        metadata = AttentionMetadata(
            positions=positions_T,
            seq_ids=seq_ids_T,
            cu_q_lens=cu_lens_S1,
            kv_lens=lengths_S,
            num_tokens=num_tokens,
            num_seqs=jnp.int32(S),
            page_tables=(tables_SM,) * len(groups),
            slots=tuple(slots(group.spec) for group in groups),
            group_of_layer=spec.group_of_layer,
        )
        num_pages = [S + 1 if group.spec.is_state else T // page_size + S + 1 for group in groups]
        kv = tuple(
            jnp.zeros((num_pages[g], *groups[g].page_shape), jnp.dtype(groups[g].spec.dtype))
            for g in spec.group_of_layer
        )
        with tracing_invariant(spec.batch_invariant):
            hidden_TD, _ = spec.model(params)(token_ids_T, kv, metadata)
        return hidden_TD

    return forward


def build_logprobs(spec: StepSpec) -> Callable[[Leaves, jax.Array, jax.Array], jax.Array]:
    """`logprobs(params, token_ids i32[T], lengths i32[S]) -> f32[T]`: of each token, given those
    before it in its text; 0 for each text's first token and for padding.

    Operations are the step's, so that the bits are those that generating gives, where a row's bits
    do not depend on its batch; all of them have derivatives.
    """
    forward = build_forward(spec)

    def logprobs(params: Leaves, token_ids_T: jax.Array, lengths_S: jax.Array) -> jax.Array:
        with differentiable(), tracing_invariant(spec.batch_invariant):
            hidden_TD = forward(params, token_ids_T, lengths_S)
            model, T = spec.model(params), token_ids_T.shape[0]
            num_blocks = -(-T // LOGITS_ROWS)
            rows = min(T, LOGITS_ROWS)
            padding = num_blocks * rows - T
            targets_T = jnp.pad(token_ids_T[1:], (0, padding + 1))
            hidden_TD = jnp.pad(hidden_TD, ((0, padding), (0, 0)))

            @jax.checkpoint  # logits are computed again on the way back, not kept
            def of_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
                hidden_RD, targets_R = block
                return chosen_logprobs(model.logits(hidden_RD, jnp.int32(rows)), targets_R)

            blocks = hidden_TD.reshape(num_blocks, rows, -1), targets_T.reshape(num_blocks, rows)
            scores_T = jax.lax.map(of_block, blocks).reshape(-1)[:T]
        scores_T = jnp.pad(scores_T[:-1], (1, 0))
        index_T = jnp.arange(T, dtype=jnp.int32)
        ends_S = jnp.cumsum(lengths_S, dtype=jnp.int32)
        is_first_T = jnp.zeros((T,), jnp.bool_).at[ends_S - lengths_S].set(True, mode="drop")
        return jnp.where(is_first_T | (index_T >= ends_S[-1]), 0.0, scores_T)

    return logprobs


def packed(
    texts: Sequence[Sequence[int]], min_tokens: int = MIN_TOKENS
) -> tuple[np.ndarray, np.ndarray]:
    """(token ids i32[T], lengths i32[S]) of one pass, both padded to powers of two: the first one
    of a shape compiles.
    """
    num_tokens = sum(map(len, texts))
    token_ids_T = np.zeros(max(min_tokens, _power_of_two(num_tokens)), np.int32)
    token_ids_T[:num_tokens] = [token_id for text in texts for token_id in text]
    lengths_S = np.zeros(_power_of_two(len(texts)), np.int32)
    lengths_S[: len(texts)] = [len(text) for text in texts]
    return token_ids_T, lengths_S


def _page_tables(lengths_S: jax.Array, num_tokens: int, page_size: int) -> jax.Array:
    """i32[S, M]: each text's pages, one after the other from page 1; 0 past its last."""
    num_pages_S = (lengths_S + (page_size - 1)) // page_size
    first_S = jnp.cumsum(num_pages_S, dtype=jnp.int32) - num_pages_S + 1
    index_M = jnp.arange(-(-num_tokens // page_size), dtype=jnp.int32)
    tables_SM = first_S[:, None] + index_M[None, :]
    return jnp.where(index_M[None, :] < num_pages_S[:, None], tables_SM, 0)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
