"""Arguments of `vllm.LLM` that mean nothing here: what to do with each, so that a script needs no
edit.

`HINTS` tune vLLM without changing results: any value is accepted, an unusual one with a warning.
`FEATURES` would change results: only the value that leaves the feature off is accepted.
"""

import logging
from typing import Any

from jengine.errors import UnsupportedError

logger = logging.getLogger(__name__)

_ANY = object()  # every value is as good as the default

HINTS: dict[str, Any] = {
    "allowed_local_media_path": _ANY,
    "allowed_media_domains": _ANY,
    "attention_config": None,
    "compilation_config": None,
    "cpu_offload_gb": 0,
    "disable_async_output_proc": False,
    "disable_custom_all_reduce": _ANY,
    "disable_log_requests": _ANY,
    "distributed_executor_backend": None,
    "download_dir": None,
    "enable_chunked_prefill": True,
    "enable_prompt_embeds": False,
    "enforce_eager": _ANY,  # there is no eager mode: XLA compiles everything, and keeps it
    "hf_token": None,
    "max_cudagraph_capture_size": None,
    "max_parallel_loading_workers": None,
    "max_seq_len_to_capture": _ANY,
    "optimization_level": None,
    "performance_mode": None,
    "profiler_config": None,
    "swap_space": _ANY,
    "tokenizer_mode": "auto",
    "tokenizer_revision": None,
    "trust_remote_code": _ANY,  # no code of a checkpoint is ever run
    "use_tqdm_on_load": _ANY,
}

FEATURES: dict[str, tuple[Any, ...]] = {
    "convert": ("auto", "none"),
    "enable_lora": (False,),
    "enable_return_routed_experts": (False,),
    "enable_sleep_mode": (False,),
    "kv_transfer_config": (),
    "limit_mm_per_prompt": ({},),
    "mm_processor_kwargs": ({},),
    "pipeline_parallel_size": (1,),
    "pooler_config": (),
    "override_pooler_config": (),
    "quantization_config": (),
    "runner": ("auto", "generate"),
    "speculative_config": (),
    "spec_method": (),
    "spec_model": (),
    "spec_tokens": (),
    "structured_outputs_config": (),
    "task": ("auto", "generate"),
}


def drop_vllm_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without the arguments above. Raises `UnsupportedError` where one asks for a feature that is
    not built.
    """
    kept: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in FEATURES:
            if value is not None and value not in FEATURES[name]:
                raise UnsupportedError(f"{name}={value!r} is not supported by this version")
        elif name in HINTS:
            default = HINTS[name]
            if default is not _ANY and value is not None and value != default:
                logger.warning("%s=%r has no effect in this engine", name, value)
        else:
            kept[name] = value
    return kept
