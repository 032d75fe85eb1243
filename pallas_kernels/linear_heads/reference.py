"""`linear_heads` as one `linear` after another, whose rows have the same bits in every batch."""

import jax
from jax import lax

from jengine.pallas_kernels.linear.api import linear


def linear_heads(x_TNH: jax.Array, w_NFH: jax.Array, *, num_tokens: jax.Array) -> jax.Array:
    def run_head(head: tuple[jax.Array, jax.Array]) -> jax.Array:
        return linear(*head, num_tokens=num_tokens)

    return lax.map(run_head, (x_TNH.swapaxes(0, 1), w_NFH)).swapaxes(0, 1)
