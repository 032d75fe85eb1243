"""Architecture name -> module. Resolved lazily, so that naming a model imports nothing else."""

import difflib
import importlib
from typing import Any

from jengine.errors import LoadError

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "jengine.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "jengine.models.llama:LlamaForCausalLM",
    "MinistralForCausalLM": "jengine.models.llama:LlamaForCausalLM",
    "Qwen3ForCausalLM": "jengine.models.qwen3:Qwen3ForCausalLM",
}


def resolve_architecture(hf_config: dict[str, Any]) -> tuple[str, Any]:
    """(architecture name, model class) of a config. Raises `LoadError` with the nearest names."""
    names = hf_config.get("architectures") or []
    for name in names:
        if target := ARCHITECTURES.get(name):
            module, _, attribute = target.partition(":")
            return name, getattr(importlib.import_module(module), attribute)
    wanted = names[0] if names else "(none)"
    near = difflib.get_close_matches(wanted, ARCHITECTURES, n=3) or sorted(ARCHITECTURES)
    raise LoadError(f"architecture {wanted!r} is not supported; nearest known: {', '.join(near)}")
