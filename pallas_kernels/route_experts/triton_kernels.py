"""The Triton kernel of routing. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl


@triton.jit
def choose_experts(
    logits_ptr,  # f32[T, E]
    bias_ptr,  # f32[E], or anything
    # outputs
    ids_ptr,  # i32[T, TOP_K]
    weights_ptr,  # f32[T, TOP_K]
    E: tl.constexpr,
    EP: tl.constexpr,  # E, rounded up to a power of two
    TOP_K: tl.constexpr,
    KP: tl.constexpr,  # TOP_K, rounded up to a power of two
    SCORING: tl.constexpr,  # "softmax", "sigmoid" or "sqrtsoftplus"
    HAS_BIAS: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """One token: its best experts one after another, equal ones by index."""
    row = tl.program_id(0)
    expert = tl.arange(0, EP)
    is_expert = expert < E
    logits = tl.load(logits_ptr + row * E + expert, mask=is_expert, other=-float("inf"))
    if SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-logits))
    elif SCORING == "sqrtsoftplus":
        scores = tl.sqrt(softplus(logits))
    else:
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    choice = logits if SCORING == "softmax" and not HAS_BIAS else scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
    choice = tl.where(is_expert, choice, -float("inf"))
    place = tl.arange(0, KP)
    ids = tl.zeros([KP], tl.int32)
    weights = tl.zeros([KP], tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.max(choice, 0)
        chosen = tl.min(tl.where(choice == best, expert, E - 1), 0)  # E - 1: of NaN alone
        ids = tl.where(place == i, chosen, ids)
        weights = tl.where(place == i, tl.sum(tl.where(expert == chosen, scores, 0.0), 0), weights)
        choice = tl.where(expert == chosen, -float("inf"), choice)
    if RENORMALISE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(ids_ptr + row * TOP_K + place, ids, mask=place < TOP_K)
    tl.store(weights_ptr + row * TOP_K + place, weights * SCALE, mask=place < TOP_K)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact to the last bits where exp(x) is small beside 1 as well."""
    power = tl.exp(-tl.abs(x))
    more = 1.0 + power
    # What the sum has lost of the power, the quotient puts back.
    log = tl.where(
        more == 1.0, power, tl.log(more) * (power / tl.where(more == 1.0, 1.0, more - 1.0))
    )
    return tl.maximum(x, 0.0) + log
