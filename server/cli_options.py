"""Command-line flags as frozen dataclasses that commands share (`flag_groups.py`), spelled as those
of vLLM where it has them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from jengine.config import EngineConfig

_MODEL = "Model"
_CACHE = "KV cache"
_SCHEDULER = "Scheduling"
_PARALLEL = "Devices"
_COMPILE = "Compilation"


def _flag(*names: str, panel: str, text: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


@dataclass(frozen=True)
class EngineFlags:
    """Flags of everything that runs a model. Values that were not given stay None: the engine's
    defaults.
    """

    model_argument: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a .gguf file, a pulled name (smollm2-135m) or a Hub id.",
        ),
    ] = None
    model: Annotated[str | None, _flag("--model", panel=_MODEL, text="The same, as a flag.")] = None
    tokenizer: Annotated[
        str | None, _flag("--tokenizer", panel=_MODEL, text="Tokenizer of another model.")
    ] = None
    served_model_name: Annotated[
        list[str] | None,
        _flag("--served-model-name", panel=_MODEL, text="Name in the API; may be repeated."),
    ] = None
    dtype: Annotated[
        str | None, _flag("--dtype", panel=_MODEL, text="auto, float32, bfloat16 or float16.")
    ] = None
    load_format: Annotated[
        str | None,
        _flag("--load-format", panel=_MODEL, text="auto, safetensors, gguf or dummy (random)."),
    ] = None
    quantization: Annotated[
        str | None,
        _flag(
            "--quantization",
            "-q",
            panel=_MODEL,
            text="The method of the checkpoint's packed weights; found out if not given.",
        ),
    ] = None
    dequantize: Annotated[
        bool,
        _flag("--dequantize", panel=_MODEL, text="Unpack such weights at load, to --dtype."),
    ] = False
    revision: Annotated[
        str | None, _flag("--revision", panel=_MODEL, text="Branch or commit on the Hub.")
    ] = None
    max_model_len: Annotated[
        int | None, _flag("--max-model-len", panel=_MODEL, text="Tokens of prompt and output.")
    ] = None
    seed: Annotated[int | None, _flag("--seed", panel=_MODEL, text="Seed of dummy weights.")] = None
    hf_overrides: Annotated[
        str | None,
        _flag(
            "--hf-overrides", panel=_MODEL, text="JSON object that replaces parts of config.json."
        ),
    ] = None
    chat_template: Annotated[
        str | None, _flag("--chat-template", panel=_MODEL, text="A Jinja file, or the text itself.")
    ] = None
    skip_tokenizer_init: Annotated[
        bool, _flag("--skip-tokenizer-init", panel=_MODEL, text="Token ids in and out only.")
    ] = False
    generation_config: Annotated[
        str | None,
        _flag("--generation-config", panel=_MODEL, text="auto: the model's; vllm: none."),
    ] = None
    max_logprobs: Annotated[
        int | None, _flag("--max-logprobs", panel=_MODEL, text="Largest logprobs; -1: vocabulary.")
    ] = None
    logprobs_mode: Annotated[
        str | None,
        _flag(
            "--logprobs-mode",
            panel=_MODEL,
            text="raw_logprobs (default), raw_logits, processed_logprobs or processed_logits.",
        ),
    ] = None
    batch_invariant: Annotated[
        bool | None,
        _flag(
            "--batch-invariant/--no-batch-invariant",
            panel=_MODEL,
            text="The same bits for a request in any batch; by default where it can be promised.",
        ),
    ] = None
    logits_processors: Annotated[
        list[str] | None,
        _flag(
            "--logits-processors",
            panel=_MODEL,
            text="module:function, or an entry point's name; may be repeated.",
        ),
    ] = None
    reasoning_config: Annotated[
        str | None,
        _flag("--reasoning-config", panel=_MODEL, text="JSON: reasoning_start_str, ..._end_str."),
    ] = None
    block_size: Annotated[
        int | None, _flag("--block-size", panel=_CACHE, text="Tokens in a page.")
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        _flag("--gpu-memory-utilization", panel=_CACHE, text="Share of device memory to use."),
    ] = None
    kv_cache_memory_bytes: Annotated[
        int | None, _flag("--kv-cache-memory-bytes", panel=_CACHE, text="Size of the KV cache.")
    ] = None
    num_gpu_blocks_override: Annotated[
        int | None, _flag("--num-gpu-blocks-override", panel=_CACHE, text="Number of pages.")
    ] = None
    kv_cache_dtype: Annotated[
        str | None, _flag("--kv-cache-dtype", panel=_CACHE, text="auto, float32 or bfloat16.")
    ] = None
    enable_prefix_caching: Annotated[
        bool | None,
        _flag(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            panel=_CACHE,
            text="Reuse pages of equal prefixes.",
        ),
    ] = None
    max_num_seqs: Annotated[
        int | None,
        _flag("--max-num-seqs", panel=_SCHEDULER, text="Requests in one step: 64, on a GPU 256."),
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        _flag(
            "--max-num-batched-tokens",
            panel=_SCHEDULER,
            text="Tokens in one step: 1024, on a GPU 8192.",
        ),
    ] = None
    scheduling_policy: Annotated[
        str | None, _flag("--scheduling-policy", panel=_SCHEDULER, text="fcfs or priority.")
    ] = None
    max_num_waiting: Annotated[
        int | None,
        _flag("--max-num-waiting", panel=_SCHEDULER, text="Queued requests before 429."),
    ] = None
    max_num_waiting_tokens: Annotated[
        int | None,
        _flag("--max-num-waiting-tokens", panel=_SCHEDULER, text="Their prompt tokens before 429."),
    ] = None
    disable_log_stats: Annotated[
        bool, _flag("--disable-log-stats", panel=_SCHEDULER, text="No line of figures every 10 s.")
    ] = False
    async_scheduling: Annotated[
        bool | None,
        _flag(
            "--async-scheduling/--no-async-scheduling",
            panel=_SCHEDULER,
            text="Plan a step while the one before runs.",
        ),
    ] = None
    max_decode_steps: Annotated[
        int | None,
        _flag(
            "--max-decode-steps",
            panel=_SCHEDULER,
            text="Decode steps in one dispatch; by default what takes 8 ms (CPU: 1).",
        ),
    ] = None
    tensor_parallel_size: Annotated[
        int | None,
        _flag(
            "--tensor-parallel-size",
            "-tp",
            panel=_PARALLEL,
            text="Devices that split every layer: 1.",
        ),
    ] = None
    enable_expert_parallel: Annotated[
        bool,
        _flag(
            "--enable-expert-parallel",
            panel=_PARALLEL,
            text="They share the routed experts out instead of splitting each.",
        ),
    ] = False
    expert_parallel_size: Annotated[
        int | None,
        _flag(
            "--expert-parallel-size",
            panel=_PARALLEL,
            text="So many parts, each of which splits its experts; by default as many as devices.",
        ),
    ] = None
    all2all_backend: Annotated[
        str | None,
        _flag("--all2all-backend", panel=_PARALLEL, text="Between data ranks; by default auto."),
    ] = None
    enable_eplb: Annotated[
        bool, _flag("--enable-eplb", panel=_PARALLEL, text="Move experts, for an even load.")
    ] = False
    num_redundant_experts: Annotated[
        int | None,
        _flag("--num-redundant-experts", panel=_PARALLEL, text="Copies of the busiest: 0."),
    ] = None
    eplb_config: Annotated[
        str | None,
        _flag("--eplb-config", panel=_PARALLEL, text="With it, JSON: step_interval (3000), ..."),
    ] = None
    data_parallel_size: Annotated[
        int | None,
        _flag(
            "--data-parallel-size",
            "-dp",
            panel=_PARALLEL,
            text="So many groups of them, each with requests of its own: 1.",
        ),
    ] = None
    compile_cache_dir: Annotated[
        Path | None,
        _flag("--compile-cache-dir", panel=_COMPILE, text="Where executables are kept."),
    ] = None
    compile_threads: Annotated[
        int | None, _flag("--compile-threads", panel=_COMPILE, text="Programs compiled at once.")
    ] = None
    background_compile: Annotated[
        bool | None,
        _flag(
            "--background-compile/--no-background-compile",
            panel=_COMPILE,
            text="Serve with the first executables while the rest compile (default on GPUs).",
        ),
    ] = None

    def build(self) -> EngineConfig:
        """Raises `typer.BadParameter` for values that do not fit."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        argument, model = given.pop("model_argument"), given.pop("model")
        if (argument is None) == (model is None):
            raise typer.BadParameter("name one model, as MODEL or with --model")
        for name in ("hf_overrides", "eplb_config", "reasoning_config"):
            if (text := given[name]) is not None:
                given[name] = _json_object(text, f"--{name.replace('_', '-')}")
        cache_dir = given.pop("compile_cache_dir")
        given["cache_dir"] = None if cache_dir is None else str(cache_dir)
        names = given.pop("served_model_name")
        given["served_model_name"] = tuple(names) if names else None
        try:
            return EngineConfig.from_kwargs(argument or model, **given)
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(str(error)) from None


def _json_object(text: str, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{flag} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{flag} must be a JSON object")
    return value
