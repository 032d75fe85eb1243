"""Architecture name -> module. Resolved lazily, so that naming a model imports nothing else.

Other packages add families by an entry point in the group `jengine.models`, named as the
architecture, with a class as value (docs/adding_a_model.md).
"""

import difflib
import importlib
import importlib.metadata
from typing import Any

from jengine.errors import LoadError

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "jengine.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "jengine.models.llama:LlamaForCausalLM",
    "MinistralForCausalLM": "jengine.models.llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": "jengine.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "jengine.models.qwen3:Qwen3ForCausalLM",
    "MixtralForCausalLM": "jengine.models.mixtral:MixtralForCausalLM",
    "GptOssForCausalLM": "jengine.models.gpt_oss:GptOssForCausalLM",
    "Qwen2MoeForCausalLM": "jengine.models.qwen2_moe:Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM": "jengine.models.qwen3_moe:Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM": "jengine.models.qwen3_next:Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM": "jengine.models.qwen3_5:Qwen35ForCausalLM",
    "Qwen3_5MoeForCausalLM": "jengine.models.qwen3_5_moe:Qwen35MoeForCausalLM",
    "DeepseekV2ForCausalLM": "jengine.models.deepseek_v2:DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": "jengine.models.deepseek_v3:DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM": "jengine.models.deepseek_v32:DeepseekV32ForCausalLM",
    "DeepseekV4ForCausalLM": "jengine.models.deepseek_v4.model:DeepseekV4ForCausalLM",
    "DeepseekV4MTPForCausalLM": "jengine.models.deepseek_v4.mtp:DeepseekV4MTPForCausalLM",
    "GlmMoeDsaForCausalLM": "jengine.models.deepseek_v32:GlmMoeDsaForCausalLM",
    "KimiK2ForCausalLM": "jengine.models.deepseek_v3:DeepseekV3ForCausalLM",
    "Gemma2ForCausalLM": "jengine.models.gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "jengine.models.gemma3:Gemma3ForCausalLM",
    "Phi3ForCausalLM": "jengine.models.phi3:Phi3ForCausalLM",
    "GraniteForCausalLM": "jengine.models.granite:GraniteForCausalLM",
    "Olmo2ForCausalLM": "jengine.models.olmo2:Olmo2ForCausalLM",
    "CohereForCausalLM": "jengine.models.cohere:CohereForCausalLM",
    "Cohere2ForCausalLM": "jengine.models.cohere:Cohere2ForCausalLM",
    "Glm4ForCausalLM": "jengine.models.glm4:Glm4ForCausalLM",
}


ENTRY_POINT_GROUP = "jengine.models"


def resolve_architecture(hf_config: dict[str, Any]) -> tuple[str, Any]:
    """(architecture name, model class) of a config. Raises `LoadError` with the nearest names."""
    names = hf_config.get("architectures") or []
    known = known_architectures()
    for name in names:
        if target := known.get(name):
            return name, _load(name, target)
    wanted = names[0] if names else "(none)"
    near = difflib.get_close_matches(wanted, known, n=3) or sorted(known)
    raise LoadError(f"architecture {wanted!r} is not supported; nearest known: {', '.join(near)}")


def known_architectures() -> dict[str, str]:
    """Ours, and those of installed packages. A package may replace one of ours: its user chose to
    install it.
    """
    others = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return ARCHITECTURES | {point.name: point.value for point in others}


def _load(name: str, target: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise LoadError(f"architecture {name!r}: {target!r} cannot be loaded: {error}") from error
