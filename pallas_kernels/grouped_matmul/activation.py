"""What may join gate and up in an expert, beside SwiGLU."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, slots=True)
class ClampedSwiGLU:
    """gpt-oss's: `(up + 1) * gate * sigmoid(alpha * gate)` of a gate of at most `limit` and an up
    within it on both sides. Where nothing is added to up and alpha is 1 it is DeepSeek-V4's.
    """

    alpha: float
    limit: float
    up_offset: float = 1.0

    def __call__(self, gate_up_TF2: jax.Array) -> jax.Array:
        """Gate and up side by side -> [T, F], in float32 and rounded once."""
        gate_TF, up_TF = jnp.split(gate_up_TF2.astype(jnp.float32), 2, axis=1)
        gate_TF = jnp.minimum(gate_TF, self.limit)
        up_TF = jnp.clip(up_TF, -self.limit, self.limit)
        product_TF = (up_TF + self.up_offset) * gate_TF * jax.nn.sigmoid(self.alpha * gate_TF)
        return product_TF.astype(gate_up_TF2.dtype)
