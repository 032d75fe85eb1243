"""What a step has of each group of tokens."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pieces:
    """The groups that a step touches, in the order of its tokens. i32[G] each; pieces past the last
    have no tokens. A sequence's pieces are neighbours."""

    seq: jax.Array
    group: jax.Array  # its number in the sequence: that of the entry, too
    row: jax.Array  # of its first token in the step
    offset: jax.Array  # tokens of the group that came in earlier steps
    count: jax.Array  # tokens of it in this step
    is_first: jax.Array  # bool: of its sequence
    last_row: jax.Array  # of the token that completes the group, -1 if none does
    last_piece_S: jax.Array  # i32[S]: of each sequence
    tokens_per_entry: int = field(metadata={"static": True})


def cut_into_pieces(
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_tokens: int,
    tokens_per_entry: int,
    *,
    is_decode: bool = False,
) -> Pieces:
    """`num_tokens` is T, the step's shape."""
    r, S = tokens_per_entry, kv_lens_S.shape[0]
    lens_S = cu_q_lens_S1[1:] - cu_q_lens_S1[:-1]
    starts_S, ends_S = kv_lens_S - lens_S, kv_lens_S
    if is_decode:
        seq_G = jnp.arange(S, dtype=jnp.int32)
        nth_G = jnp.zeros_like(seq_G)
        last_piece_S = seq_G
        is_real_G = lens_S > 0
    else:
        num_S = jnp.where(lens_S > 0, (ends_S - 1) // r - starts_S // r + 1, 0)
        stops_S = jnp.cumsum(num_S)
        # A sequence's tokens touch one group each at most, and two more than they fill.
        G = min(num_tokens, num_tokens // r + 2 * S)
        piece_G = jnp.arange(G, dtype=jnp.int32)
        seq_G = jnp.minimum(
            jnp.searchsorted(stops_S, piece_G, side="right", method="compare_all"), S - 1
        )
        seq_G = seq_G.astype(jnp.int32)
        nth_G = piece_G - (stops_S - num_S)[seq_G]
        last_piece_S = jnp.maximum(stops_S - 1, 0)
        is_real_G = piece_G < stops_S[-1]
    start_G, end_G = starts_S[seq_G], ends_S[seq_G]
    group_G = start_G // r + nth_G
    first_G = jnp.maximum(start_G, group_G * r)  # positions of the piece's tokens
    stop_G = jnp.minimum(end_G, (group_G + 1) * r)
    row_G = cu_q_lens_S1[seq_G] + first_G - start_G
    count_G = jnp.where(is_real_G, stop_G - first_G, 0)
    is_complete_G = is_real_G & (stop_G == (group_G + 1) * r)
    return Pieces(
        seq=seq_G,
        group=group_G,
        row=jnp.minimum(row_G, num_tokens - 1),
        offset=jnp.where(is_real_G, first_G - group_G * r, 0),
        count=count_G,
        is_first=nth_G == 0,
        last_row=jnp.where(is_complete_G, row_G + count_G - 1, -1),
        last_piece_S=last_piece_S,
        tokens_per_entry=r,
    )
