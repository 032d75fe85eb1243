"""Float64 oracle of the sampler: sorts, in the order of operations of vLLM 0.22. Ties of a
threshold are all kept.
"""

import numpy as np

from jengine.request import SamplingParams


def adjusted_logits(
    logits: np.ndarray, p: SamplingParams, prompt: list[int], output: list[int], banned: list[int]
) -> np.ndarray:
    x = logits.astype(np.float64).copy()
    if p.allowed_token_ids is not None:
        outside = np.ones(x.size, bool)
        outside[p.allowed_token_ids] = False
        x[outside] = -np.inf
    for token, value in (p.logit_bias or {}).items():
        x[token] += value
    x[banned] = -np.inf
    for token in set(prompt) | set(output):
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
    for token in set(output):
        x[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    return x


def distribution(x: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, min_p, top_k and top_p."""
    return _softmax(processed_logits(x, p))


def processed_logits(x: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Adjusted logits after temperature, min_p, top_k and top_p, -inf outside of them."""
    if p.temperature == 0:
        return x
    x = x / p.temperature
    probs = _softmax(x)
    x = np.where(probs >= p.min_p * probs.max(), x, -np.inf)
    if p.top_k > 0:
        kth = np.sort(x)[::-1][min(p.top_k, x.size) - 1]
        x = np.where(x >= kth, x, -np.inf)
    if p.top_p < 1.0:
        probs = _softmax(x)
        order = np.argsort(-probs, kind="stable")
        last = order[np.searchsorted(np.cumsum(probs[order]), p.top_p)]
        x = np.where(x >= x[last], x, -np.inf)
    return x


def reported(values: np.ndarray, *, is_normalised: bool) -> np.ndarray:
    """What a logprobs mode reports of raw or processed logits."""
    return np.log(_softmax(values)) if is_normalised else values


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()
