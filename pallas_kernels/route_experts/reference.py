"""Plain-JAX routing."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.route_experts.grouped import GroupedRouting
from jengine.pallas_kernels.top_k_rows.api import top_k_rows


def route(logits_TE: jax.Array, top_k: int, *, renormalise: bool) -> tuple[jax.Array, jax.Array]:
    top_Tk, ids_Tk = top_k_rows(logits_TE, top_k)
    scores_Tk = jnp.exp(top_Tk - top_Tk[:, :1])
    over = scores_Tk if renormalise else jnp.exp(logits_TE - top_Tk[:, :1])
    return ids_Tk, scores_Tk / _row_sums(over)


def route_grouped(
    logits_TE: jax.Array,
    bias_E: jax.Array | None,
    top_k: int,
    routing: GroupedRouting,
    *,
    renormalise: bool,
) -> tuple[jax.Array, jax.Array]:
    scores_TE = _scores(logits_TE, routing)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E[None, :]
    if routing.top_groups < routing.num_groups:
        choice_TE = _best_groups_only(choice_TE, routing, best=1 if bias_E is None else 2)
    _, ids_Tk = top_k_rows(choice_TE, top_k)
    return ids_Tk, _weights(scores_TE, ids_Tk, routing, renormalise)


def route_given(
    logits_TE: jax.Array, ids_Tk: jax.Array, routing: GroupedRouting, *, renormalise: bool
) -> jax.Array:
    return _weights(_scores(logits_TE, routing), ids_Tk, routing, renormalise)


def _scores(logits_TE: jax.Array, routing: GroupedRouting) -> jax.Array:
    if routing.scoring == "sigmoid":
        return jax.nn.sigmoid(logits_TE)
    if routing.scoring == "sqrtsoftplus":
        return jnp.sqrt(jax.nn.softplus(logits_TE))
    powers_TE = jnp.exp(logits_TE - top_k_rows(logits_TE, 1)[0])
    return powers_TE / _row_sums(powers_TE)


def _weights(
    scores_TE: jax.Array, ids_Tk: jax.Array, routing: GroupedRouting, renormalise: bool
) -> jax.Array:
    weights_Tk = jnp.take_along_axis(scores_TE, ids_Tk, axis=1)
    if renormalise:
        weights_Tk = weights_Tk / (_row_sums(weights_Tk) + 1e-20)
    return weights_Tk * routing.scale


def _best_groups_only(choice_TE: jax.Array, routing: GroupedRouting, best: int) -> jax.Array:
    """-inf for experts of other groups than the best, by the sum of their `best` experts."""
    (T, E), G = choice_TE.shape, routing.num_groups
    tops, _ = top_k_rows(choice_TE.reshape(T * G, E // G), best)
    _, groups_Tg = top_k_rows(_row_sums(tops).reshape(T, G), routing.top_groups)
    group_E = jnp.arange(E, dtype=jnp.int32) // (E // G)
    is_in_TE = jnp.any(groups_Tg[:, :, None] == group_E[None, None, :], axis=1)
    return jnp.where(is_in_TE, choice_TE, -jnp.inf)


def _row_sums(x_TE: jax.Array) -> jax.Array:
    """[T, 1], halves added to halves: XLA:CPU's own row sums change their order with the number of
    rows, and a weight's bits would depend on its batch.
    """
    width = x_TE.shape[1]
    size = 1 << (width - 1).bit_length()
    x_TE = jnp.pad(x_TE, ((0, 0), (0, size - width)))
    while size > 1:
        size //= 2
        x_TE = x_TE[:, :size] + x_TE[:, size:]
    return x_TE
