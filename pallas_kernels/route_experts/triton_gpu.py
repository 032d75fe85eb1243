"""Routing on NVIDIA GPUs: one kernel, where XLA needs a dozen."""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.platform import require_cuda
from jengine.pallas_kernels.route_experts.grouped import GroupedRouting
from jengine.pallas_kernels.triton_call import Schedule, triton_call

MAX_EXPERTS = 1024
PLAIN = GroupedRouting("softmax")


def route(logits_TE: jax.Array, top_k: int, *, renormalise: bool) -> tuple[jax.Array, jax.Array]:
    return route_grouped(logits_TE, None, top_k, PLAIN, renormalise=renormalise)


def route_grouped(
    logits_TE: jax.Array,
    bias_E: jax.Array | None,
    top_k: int,
    routing: GroupedRouting,
    *,
    renormalise: bool,
) -> tuple[jax.Array, jax.Array]:
    T, E = logits_TE.shape
    if routing.top_groups < routing.num_groups or E > MAX_EXPERTS or logits_TE.dtype != jnp.float32:
        raise NotImplementedError(f"{routing.num_groups} groups, {E} experts")
    require_cuda()
    from jengine.pallas_kernels.route_experts.triton_kernels import choose_experts

    ids_Tk, weights_Tk = triton_call(
        choose_experts,
        (logits_TE, logits_TE if bias_E is None else bias_E),
        [
            jax.ShapeDtypeStruct((T, top_k), jnp.int32),
            jax.ShapeDtypeStruct((T, top_k), jnp.float32),
        ],
        grid=(T,),
        constants={
            "E": E,
            "EP": 1 << (E - 1).bit_length(),
            "TOP_K": top_k,
            "KP": 1 << (top_k - 1).bit_length(),
            "SCORING": routing.scoring,
            "HAS_BIAS": bias_E is not None,
            "RENORMALISE": renormalise,
            "SCALE": float(routing.scale),
        },
        schedule=Schedule(num_warps=1 if E <= 128 else 4, num_stages=1),
    )
    return ids_Tk, weights_Tk
