"""`add_rms_norm`: a block's result is added to the residual stream, and the sum normalised."""

import jax

from jengine.pallas_kernels.add_rms_norm import reference, triton_gpu
from jengine.pallas_kernels.dispatch import first_of

_add_rms_norm = first_of(triton_gpu.add_rms_norm, reference.add_rms_norm)


def add_rms_norm(
    x_TD: jax.Array,
    parts_PTD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return (`x` plus the sum of `parts`, `rms_norm` of that), both [T, D] in `x.dtype`.

    `parts` are one sum, or `expert_parts`': added up in their order in float32, and rounded to
    `x.dtype` before they are added to `x`. Rows at or past `num_tokens` are padding: finite,
    whatever their summands are, otherwise unspecified.
    """
    return _add_rms_norm(x_TD, parts_PTD, weight_D, eps=eps, num_tokens=num_tokens)
