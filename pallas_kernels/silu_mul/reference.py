"""Plain-JAX `silu_mul`."""

import jax
import jax.numpy as jnp


def silu_mul(gate_up_TF2: jax.Array, *, num_tokens: jax.Array | None = None) -> jax.Array:
    del num_tokens  # padding rows are computed like the rest
    gate_TF, up_TF = jnp.split(gate_up_TF2.astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate_TF) * up_TF).astype(gate_up_TF2.dtype)
