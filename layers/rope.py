"""Rotations of rotary position embedding and their length-scaling variants (arXiv:2104.09864; names
as in Hugging Face configs).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SUPPORTED_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeTable:
    """Rotation speeds of one layer kind. `inv_freq` has H/2 entries, radians per position;
    `scaling` multiplies cos and sin.
    """

    inv_freq: tuple[float, ...]
    scaling: float = 1.0


def build_rope(
    head_dim: int,
    theta: float,
    scaling: Mapping[str, Any] | None,
    max_position_embeddings: int,
    max_model_len: int,
) -> RopeTable:
    """Compute the rotation table that a config asks for. `scaling` is the config's `rope_scaling` /
    `rope_parameters`.

    "dynamic" (NTK) and "longrope" depend on the length of the whole text in Hugging Face, which
    changes the rotation of old keys as a text grows. Here the length is the engine's
    `max_model_len`, so that a token's rotation depends on its position alone.

    Raises `ValueError` for an unknown type or a missing field.
    """
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    dim = int(head_dim * scaling.get("partial_rotary_factor", 1.0))
    inv_freq = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    factor = float(scaling.get("factor", 1.0))
    attention_scaling = 1.0
    if kind == "linear":
        inv_freq = inv_freq / factor
    elif kind == "dynamic":
        if max_model_len > max_position_embeddings:
            stretch = factor * max_model_len / max_position_embeddings - (factor - 1)
            base = theta * stretch ** (dim / (dim - 2))
            inv_freq = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, scaling, factor)
    elif kind == "yarn":
        inv_freq, attention_scaling = _yarn(inv_freq, dim, theta, scaling, max_position_embeddings)
    elif kind == "longrope":
        inv_freq, attention_scaling = _longrope(
            inv_freq, scaling, max_position_embeddings, max_model_len
        )
    elif kind != "default":
        raise ValueError(
            f"rope type {kind!r} is not supported; known: {', '.join(SUPPORTED_TYPES)}"
        )
    return RopeTable(tuple(inv_freq.astype(np.float32).tolist()), float(attention_scaling))


def rope_cos_sin(table: RopeTable, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [T, H/2], shared by all layers of a step."""
    inv_freq = jnp.asarray(np.asarray(table.inv_freq, np.float32))
    angles = positions_T.astype(jnp.float32)[:, None] * inv_freq[None, :]
    cos, sin = jnp.cos(angles) * table.scaling, jnp.sin(angles) * table.scaling
    # Without the barrier XLA:CPU computes them again in every layer's fusion: 3 % of a prefill.
    return jax.lax.optimization_barrier((cos, sin))


def _llama3(inv_freq: np.ndarray, scaling: Mapping[str, Any], factor: float) -> np.ndarray:
    """Llama 3.1: slow rotations are divided by `factor`, fast ones kept, a smooth ramp between."""
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def _yarn(
    inv_freq: np.ndarray, dim: int, theta: float, scaling: Mapping[str, Any], max_position: int
) -> tuple[np.ndarray, float]:
    """YaRN (arXiv:2309.00071): NTK by parts, and a temperature on the attention logits."""
    original = scaling.get("original_max_position_embeddings") or max_position
    factor = float(scaling.get("factor") or max_position / original)

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention_scaling = scaling.get("attention_factor")
    if attention_scaling is None:
        weight, weight_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if weight and weight_all:
            attention_scaling = mscale(factor, weight) / mscale(factor, weight_all)
        else:
            attention_scaling = mscale(factor)

    def correction_dim(num_rotations: float) -> float:
        return dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = correction_dim(scaling.get("beta_fast") or 32.0)
    high = correction_dim(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), float(attention_scaling)


def _longrope(
    inv_freq: np.ndarray, scaling: Mapping[str, Any], max_position: int, max_model_len: int
) -> tuple[np.ndarray, float]:
    """LongRoPE (arXiv:2402.13753): one divisor per pair of dimensions, short or long by the length
    served.
    """
    original = scaling.get("original_max_position_embeddings") or max_position
    factor = scaling.get("factor") or max_position / original
    divisors = scaling["long_factor"] if max_model_len > original else scaling["short_factor"]
    attention_scaling = scaling.get("attention_factor")
    if attention_scaling is None:
        attention_scaling = (
            1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        )
    return inv_freq / np.asarray(divisors, np.float64), float(attention_scaling)
