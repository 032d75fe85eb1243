"""`route`, `route_grouped`, `route_given`: a token's few experts and their weights, from the
router's logits.
"""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.route_experts import reference, triton_gpu
from jengine.pallas_kernels.route_experts.grouped import GroupedRouting

__all__ = ["GroupedRouting", "route", "route_given", "route_grouped"]

_route = first_of(triton_gpu.route, reference.route)
_route_given = first_of(reference.route_given)
_route_grouped = first_of(triton_gpu.route_grouped, reference.route_grouped)


def route(logits_TE: jax.Array, top_k: int, *, renormalise: bool) -> tuple[jax.Array, jax.Array]:
    """(expert ids i32 [T, k], weights f32 [T, k]), the most probable expert first, equal ones by
    index. Weights are softmax probabilities over all experts, or over the chosen ones alone if
    `renormalise`.
    """
    return _route(logits_TE, top_k, renormalise=renormalise)


def route_grouped(
    logits_TE: jax.Array,
    bias_E: jax.Array | None,
    top_k: int,
    routing: GroupedRouting,
    *,
    renormalise: bool,
) -> tuple[jax.Array, jax.Array]:
    """As `route`, but the experts are chosen by score plus bias among those of the best groups.

    A group counts as much as its best expert, or with a bias its best two together.
    """
    return _route_grouped(logits_TE, bias_E, top_k, routing, renormalise=renormalise)


def route_given(
    logits_TE: jax.Array, ids_Tk: jax.Array, routing: GroupedRouting, *, renormalise: bool
) -> jax.Array:
    """f32 [T, k]: the weights that `route_grouped` gives to these experts, chosen otherwise."""
    return _route_given(logits_TE, ids_Tk, routing, renormalise=renormalise)
