"""jengine: a JAX/XLA inference engine for large language models.

    from jengine import LLM, SamplingParams

    llm = LLM("smollm2-135m") print(llm.generate("The capital of France is",
    SamplingParams(temperature=0.0))[0].outputs[0].text)

Names are imported on first use: `import jengine` is quick and does not import jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jengine.async_engine import AsyncEngine
    from jengine.beam_search import BeamSearchParams
    from jengine.config import EngineConfig
    from jengine.errors import (
        DuplicateRequestError,
        EngineDeadError,
        EngineDrainingError,
        InvalidRequestError,
        JengineError,
        LoadError,
        ModelNotFoundError,
        QueueFullError,
        UnsupportedError,
    )
    from jengine.input_processor import TextPrompt, TokensPrompt
    from jengine.llm import LLM
    from jengine.logits_processors import LogitsContext, Parameter, logits_processor
    from jengine.model_info import ModelInfo
    from jengine.outputs import CompletionOutput, Logprob, RequestOutput
    from jengine.request import RepetitionDetectionParams, RequestOutputKind, SamplingParams
    from jengine.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "DuplicateRequestError",
    "EngineConfig",
    "EngineDeadError",
    "EngineDrainingError",
    "InvalidRequestError",
    "JengineError",
    "LoadError",
    "LogitsContext",
    "Logprob",
    "ModelInfo",
    "ModelNotFoundError",
    "Parameter",
    "QueueFullError",
    "RepetitionDetectionParams",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "UnsupportedError",
    "__version__",
    "logits_processor",
]

_MODULES = {
    "AsyncEngine": "jengine.async_engine",
    "BeamSearchParams": "jengine.beam_search",
    "CompletionOutput": "jengine.outputs",
    "EngineConfig": "jengine.config",
    "LLM": "jengine.llm",
    "LogitsContext": "jengine.logits_processors",
    "Logprob": "jengine.outputs",
    "ModelInfo": "jengine.model_info",
    "Parameter": "jengine.logits_processors",
    "RepetitionDetectionParams": "jengine.request",
    "RequestOutput": "jengine.outputs",
    "RequestOutputKind": "jengine.request",
    "SamplingParams": "jengine.request",
    "StructuredOutputsParams": "jengine.structured_outputs",
    "TextPrompt": "jengine.input_processor",
    "TokensPrompt": "jengine.input_processor",
    "logits_processor": "jengine.logits_processors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jengine' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "jengine.errors")), name)


def __dir__() -> list[str]:
    return __all__
