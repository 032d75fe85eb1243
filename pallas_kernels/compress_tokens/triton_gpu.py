"""The compression of tokens on NVIDIA GPUs (`triton_kernels.py`): one kernel, where XLA needs one
for each turn of a group's tokens.
"""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.compress_tokens.pieces import Pieces
from jengine.pallas_kernels.gated_delta.reference import write
from jengine.pallas_kernels.platform import require_cuda
from jengine.pallas_kernels.triton_call import Schedule, triton_call

BLOCK = 128  # channels of a program: four of each thread
UNROLL = 4  # tokens that are read at once


def compress_tokens(
    values_TUH: jax.Array,
    scores_TUH: jax.Array,
    states_PE: jax.Array,
    slots_2S: jax.Array,
    pieces: Pieces,
    *,
    is_decode: bool = False,
) -> tuple[jax.Array, jax.Array]:
    require_cuda()
    from jengine.pallas_kernels.compress_tokens.triton_kernels import compress_pieces

    (_, U, H), S, G = values_TUH.shape, slots_2S.shape[1], pieces.seq.shape[0]
    is_last_G = pieces.last_piece_S[pieces.seq] == jnp.arange(G, dtype=jnp.int32)
    pieces_G6 = jnp.stack(
        [pieces.seq, pieces.row, pieces.offset, pieces.count,
         pieces.is_first.astype(jnp.int32), is_last_G.astype(jnp.int32)],
        axis=1,
    )  # fmt: skip
    # Of several pieces the first reads the state that the last would write over.
    left_shape = states_PE.shape if is_decode else (S, states_PE.shape[1])
    entries_GH, left = triton_call(
        compress_pieces,
        (values_TUH, scores_TUH, states_PE, slots_2S, pieces_G6),
        [
            jax.ShapeDtypeStruct((G, H), jnp.float32),
            jax.ShapeDtypeStruct(left_shape, jnp.float32),
        ],
        grid=(G, -(-H // BLOCK)),
        constants={
            "S": S,
            "U": U,
            "H": H,
            "BLOCK": BLOCK,
            "UNROLL": 1 if is_decode else UNROLL,
            "IN_PLACE": is_decode,
        },
        schedule=Schedule(num_warps=1, num_stages=1),
        aliases={2: 1} if is_decode else {},
    )
    return entries_GH, left if is_decode else write(states_PE, slots_2S[1], 0, left)
