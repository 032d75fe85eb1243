"""Plain-JAX `log_softmax_rows`."""

import jax


def log_softmax_rows(x_SV: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(x_SV, axis=-1)
