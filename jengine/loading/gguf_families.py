"""llama.cpp's architectures that we read: what each says beyond the keys that all share, as fields
of config.json. The names of their tensors are in models/.

What its converter does to values, for the weight tables there: the norms of Gemma are stored as
1 + w; q and k of `llama` alone have their rows permuted (gguf_config.py); `phi3` keeps q, k, v and
gate, up fused, as its checkpoints do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jengine.errors import LoadError

LONG_FACTORS = "rope_factors_long.weight"
# A float tensor of the file, by its name; None where it is absent.
ReadTensor = Callable[[str], np.ndarray | None]


class Keys:
    """Metadata under the architecture's prefix. A per-layer array counts as one number if all
    layers agree.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self.prefix = architecture

    def get(self, key: str, default: Any = None) -> Any:
        value = self._metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise LoadError(f"{self.prefix}.{key} differs between layers: not supported")
            value = value[0]
        return short(value)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise LoadError(f"the GGUF file has no metadata key '{self.prefix}.{key}'")
        return value


def short(value: Any) -> Any:
    """The shortest decimal of a float32: 1e-05, as the config.json had it, not
    9.999999747378752e-06. Anything but a float is returned as it is.
    """
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _nothing(keys: Keys, config: Mapping[str, Any], read: ReadTensor) -> dict[str, Any]:
    del keys, config, read
    return {}


@dataclass(frozen=True)
class GGUFFamily:
    """One architecture. `derive` gives what is not a key of its own, from the fields that are read
    already.
    """

    architecture: str  # in config.json
    # config.json's field -> key; a field whose key the file lacks keeps config.json's default
    fields: Mapping[str, str] = field(default_factory=dict)
    derive: Callable[[Keys, Mapping[str, Any], ReadTensor], dict[str, Any]] = _nothing
    rotates_a_part: bool = False  # of each head: rope.dimension_count is not the head size


def _gemma_scale(layers_of_27b: int) -> Callable[..., dict[str, Any]]:
    """Scores are scaled by the head size, but in the 27B models by the model's width over its
    heads. The files do not say; llama.cpp goes by the number of layers too.
    """

    def derive(keys: Keys, config: Mapping[str, Any], read: ReadTensor) -> dict[str, Any]:
        del keys, read
        is_27b = config["num_hidden_layers"] == layers_of_27b
        width = config["hidden_size"] // config["num_attention_heads"]
        return {"query_pre_attn_scalar": width if is_27b else config["head_dim"]}

    return derive


def _long_rope(keys: Keys, config: Mapping[str, Any], read: ReadTensor) -> dict[str, Any]:
    """The divisors are tensors."""
    fields: dict[str, Any] = {
        "partial_rotary_factor": keys.need("rope.dimension_count") / config["head_dim"]
    }
    long, brief = read(LONG_FACTORS), read("rope_factors_short.weight")
    if long is None or brief is None:
        return fields
    fields["rope_scaling"] = {
        "rope_type": "longrope",
        "long_factor": [short(factor) for factor in long.tolist()],
        "short_factor": [short(factor) for factor in brief.tolist()],
    }
    if (factor := keys.get("rope.scaling.attn_factor")) is not None:
        fields["rope_scaling"]["attention_factor"] = factor
    return fields


_WINDOW = {"sliding_window": "attention.sliding_window"}

FAMILIES: dict[str, GGUFFamily] = {
    "llama": GGUFFamily("LlamaForCausalLM"),
    "qwen2": GGUFFamily("Qwen2ForCausalLM"),
    "qwen3": GGUFFamily("Qwen3ForCausalLM"),
    "gemma2": GGUFFamily(
        "Gemma2ForCausalLM",
        {
            **_WINDOW,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        _gemma_scale(layers_of_27b=46),
    ),
    "gemma3": GGUFFamily(
        "Gemma3ForCausalLM",
        {
            **_WINDOW,
            "sliding_window_pattern": "attention.sliding_window_pattern",
            "rope_local_base_freq": "rope.freq_base_swa",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        _gemma_scale(layers_of_27b=62),
    ),
    "phi3": GGUFFamily(
        "Phi3ForCausalLM",
        {
            **_WINDOW,
            "original_max_position_embeddings": "rope.scaling.original_context_length",
        },
        _long_rope,
        rotates_a_part=True,
    ),
}
