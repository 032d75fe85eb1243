"""Configuration: one frozen dataclass per concern, composed in `EngineConfig`. The only reader of
the environment.
"""

import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from jengine.cluster import ClusterFlags
from jengine.errors import UnsupportedError

LogprobsMode = Literal["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
All2AllBackend = Literal["auto", "allgather_reducescatter", "padded_all_to_all"]
QUANT_METHODS = {  # vLLM's names -> what config.json calls them
    "fp8": "fp8",
    "deepseek_v4_fp8": "fp8",
    "mxfp4": "mxfp4",
    "gpt_oss_mxfp4": "mxfp4",
}

_MEMORY_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def cache_root() -> Path:
    """The user's cache folder of jengine: `$JENGINE_CACHE`, else `$XDG_CACHE_HOME/jengine`, else
    `~/.cache/jengine`.
    """
    if path := os.environ.get("JENGINE_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jengine"


def is_hub_offline() -> bool:
    """Whether the user forbids downloads (`HF_HUB_OFFLINE=1`, as huggingface_hub spells it)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def is_native_disabled() -> bool:
    """`JENGINE_NATIVE=0` turns the C++ CPU library off: every operation then takes its plain-JAX
    path.
    """
    return os.environ.get("JENGINE_NATIVE", "1") == "0"


def xla_flags() -> str:
    """The user's flags for every compilation; part of the key of stored executables."""
    return os.environ.get("XLA_FLAGS", "")


def device_memory_share() -> float:
    """The share of a GPU's memory that XLA's allocator takes: as the environment says, else XLA's
    own default.
    """
    return float(next((s for n in _MEMORY_SHARE if (s := os.environ.get(n))), 0.75))


def set_device_memory_share(share: float) -> None:
    """For a back end that has not started yet. What the user has set stands."""
    if not any(os.environ.get(name) for name in _MEMORY_SHARE):
        os.environ[_MEMORY_SHARE[0]] = f"{share:.4f}"


def expects_gpu() -> bool:
    """Whether an engine started now would run on an NVIDIA GPU, told without starting JAX: there is
    a driver, JAX's plugin for it, and nobody has asked for another platform.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return (
        Path("/dev/nvidiactl").exists()
        and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
        and (not platforms or "cuda" in platforms or "gpu" in platforms)
    )


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs that a process started now would see, as `CUDA_VISIBLE_DEVICES` spells
    them: what it lists, else the index of each device file.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return tuple(str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*")))
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def environment(names: Iterable[str]) -> dict[str, str]:
    """Those of the variables that are set and not empty."""
    return {name: value for name in names if (value := os.environ.get(name))}


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Our environment with some variables replaced, for a process that we start."""
    return {**os.environ, **changes}


@dataclass(frozen=True, slots=True)
class ModelArgs:
    """Which model, and how its weights are read."""

    model: str
    tokenizer: str | None = None
    served_model_name: tuple[str, ...] = ()
    dtype: Dtype = "auto"
    load_format: LoadFormat = "auto"
    # Weights stay packed as the checkpoint has them, and this may name their method; `dequantize`
    # makes them arrays of `dtype` at load.
    quantization: str | None = None
    dequantize: bool = False
    revision: str | None = None
    max_model_len: int | None = None
    seed: int = 0
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    skip_tokenizer_init: bool = False
    generation_config: Literal["auto", "vllm"] = (
        "auto"  # "vllm": ignore the model's sampling defaults
    )

    def __post_init__(self) -> None:
        if self.quantization is not None and self.quantization not in QUANT_METHODS:
            raise UnsupportedError(
                f"quantization={self.quantization!r} is not supported by this version; "
                f"supported: {', '.join(QUANT_METHODS)}"
            )


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache. `num_pages` overrides every plan (tests); else bytes, else a share of
    device memory.
    """

    page_size: int | None = None  # tokens; None: 16, or what the model's entries ask for
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None  # CPU default: 1 GiB, or what is free if less
    num_pages: int | None = None
    kv_cache_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    enable_prefix_caching: bool = True
    poison: bool = False  # fill unused pages with NaN (tests)


GPU_LIMITS = {"max_num_seqs": 256, "max_num_batched_tokens": 8192}


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What one step may hold. Names as in vLLM. Defaults are a CPU's; where an engine is built from
    flat arguments and expects a GPU, they are `GPU_LIMITS`.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    policy: Literal["fcfs", "priority"] = "fcfs"
    max_num_waiting: int = 4096
    max_num_waiting_tokens: int | None = None  # of prompts; None: as many as their number allows
    async_scheduling: bool = True
    max_decode_steps: int | None = None  # in one dispatch; None: the device decides


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """Buckets and the executables kept on disk."""

    cache_dir: str | None = None  # None: cache_root() / "executables"
    keep_executables: bool = True
    compile_threads: int | None = None  # None: 8 on a GPU, 2 on a CPU, or as many as there are
    # Serve as soon as every plan has a bucket, and compile the other buckets meanwhile. None: on a
    # GPU only, since on a CPU compiling takes the very cores that serve.
    background_compile: bool | None = None
    decode_buckets: tuple[int, ...] = ()  # () = powers of two up to max_num_seqs
    prefill_buckets: tuple[int, ...] = ()  # () = the default ladder up to max_num_batched_tokens


@dataclass(frozen=True, slots=True)
class EplbConfig:
    """When routed experts are moved, so that all ranks get as much to do (docs/parallelism.md).
    Names as in vLLM.
    """

    window_size: int = 1000  # steps whose tokens are counted before each decision
    step_interval: int = 3000  # steps between decisions
    num_redundant_experts: int = 0  # places more than experts, in each layer
    log_balancedness: bool = False  # how even the load was, at each decision


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Over how many devices of this machine the model is split (docs/parallelism.md). Names as in
    vLLM.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1  # so many times that, each for requests of its own
    enable_expert_parallel: bool = False  # over all of them
    # With expert parallelism: of each tensor-parallel group, ranks that share the experts out; the
    # others split each expert. None: all share them out.
    expert_parallel_size: int | None = None
    # How tokens of data ranks come to each other's experts; "auto" decides by their number.
    all2all_backend: All2AllBackend = "auto"
    enable_eplb: bool = False
    eplb: EplbConfig = EplbConfig()

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def num_expert_ranks(self) -> int:
        """Ranks of a tensor-parallel group that share the routed experts out; one where each expert
        is split."""
        if not self.enable_expert_parallel:
            return 1
        return self.expert_parallel_size or self.tensor_parallel_size

    @property
    def num_balanced_ranks(self) -> int:
        """Parts of the routed experts: over all data ranks where experts are shared out."""
        return self.num_expert_ranks * self.data_parallel_size


@dataclass(frozen=True, slots=True)
class ReasoningConfig:
    """The texts around what a model thinks (vLLM's names), for `thinking_token_budget`."""

    reasoning_start_str: str = "<think>"
    reasoning_end_str: str = "</think>"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine is built from. Picklable and hashable parts only; no derived state."""

    model: ModelArgs
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    compile: CompileConfig = CompileConfig()
    parallel: ParallelConfig = ParallelConfig()
    # Several processes run this engine together, and this is one of them; None: it is alone.
    gang: ClusterFlags | None = None
    max_logprobs: int = 20
    logprobs_mode: LogprobsMode = "raw_logprobs"
    # A request gives the same bits in any batch (docs/determinism.md). None: where we can promise
    # it; True: or else do not start. On a CPU it is always so.
    batch_invariant: bool | None = None
    # Functions, "module:function", or names of entry points (`logits_processors.py`). To a
    # core in a process of its own only strings can be sent.
    logits_processors: tuple[Any, ...] = ()
    reasoning_config: ReasoningConfig | None = None
    disable_log_stats: bool = False

    def __post_init__(self) -> None:
        positive = {
            "page_size": self.cache.page_size,
            "max_num_seqs": self.scheduler.max_num_seqs,
            "max_num_batched_tokens": self.scheduler.max_num_batched_tokens,
            "max_decode_steps": self.scheduler.max_decode_steps,
            "tensor_parallel_size": self.parallel.tensor_parallel_size,
            "data_parallel_size": self.parallel.data_parallel_size,
            "expert_parallel_size": self.parallel.expert_parallel_size,
            "max_num_waiting_tokens": self.scheduler.max_num_waiting_tokens,
            "window_size": self.parallel.eplb.window_size,
            "step_interval": self.parallel.eplb.step_interval,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.scheduler.max_num_batched_tokens < self.scheduler.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens "
                f"({self.scheduler.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.scheduler.max_num_seqs}): "
                "a decode step holds one token of each"
            )
        if self.logprobs_mode not in get_args(LogprobsMode):
            raise ValueError(
                f"logprobs_mode must be one of {', '.join(get_args(LogprobsMode))}, "
                f"got {self.logprobs_mode!r}"
            )
        if self.parallel.all2all_backend not in get_args(All2AllBackend):
            raise ValueError(
                f"all2all_backend must be one of {', '.join(get_args(All2AllBackend))}, "
                f"got {self.parallel.all2all_backend!r}"
            )
        if not 0.0 < self.cache.gpu_memory_utilization <= 1.0:
            raise ValueError("gpu_memory_utilization must be in (0, 1]")
        parallel = self.parallel
        if parallel.expert_parallel_size is not None and not parallel.enable_expert_parallel:
            raise ValueError("expert_parallel_size needs enable_expert_parallel")
        if parallel.tensor_parallel_size % parallel.num_expert_ranks:
            raise ValueError(
                f"expert_parallel_size ({parallel.num_expert_ranks}) must divide "
                f"tensor_parallel_size ({parallel.tensor_parallel_size})"
            )
        _check_eplb(parallel)
        if self.batch_invariant and parallel.enable_eplb:
            raise ValueError(
                "batch_invariant: cannot be promised with enable_eplb: sums are formed of other "
                "parts when experts move"
            )

    @classmethod
    def from_kwargs(cls, model: str, **kwargs: Any) -> Self:
        """Build from flat, vLLM-spelled arguments (`LLM(model, **kwargs)` and the CLI).

        `block_size` is vLLM's word for `page_size`, `num_gpu_blocks_override` for `num_pages`.
        Unknown names raise `TypeError`.
        """
        aliases = {
            "block_size": "page_size",
            "num_gpu_blocks_override": "num_pages",
            "scheduling_policy": "policy",
        }
        kwargs = {aliases.get(k, k): v for k, v in kwargs.items() if v is not None}
        if expects_gpu():
            kwargs = GPU_LIMITS | kwargs
        if isinstance(kwargs.get("served_model_name"), str):
            kwargs["served_model_name"] = (kwargs["served_model_name"],)
        kwargs = _with_eplb(kwargs)
        parts = {
            "model": ModelArgs,
            "cache": CacheConfig,
            "scheduler": SchedulerConfig,
            "compile": CompileConfig,
            "parallel": ParallelConfig,
        }
        built: dict[str, Any] = {}
        for name, part in parts.items():
            mine = {
                k: kwargs.pop(k) for k in part.__dataclass_fields__ if k != "model" and k in kwargs
            }
            built[name] = part(model=model, **mine) if part is ModelArgs else part(**mine)
        if "logits_processors" in kwargs:
            kwargs["logits_processors"] = tuple(kwargs["logits_processors"])
        if isinstance(reasoning := kwargs.get("reasoning_config"), dict):
            kwargs["reasoning_config"] = ReasoningConfig(**reasoning)
        names = (
            "gang",
            "max_logprobs",
            "logprobs_mode",
            "batch_invariant",
            "logits_processors",
            "reasoning_config",
            "disable_log_stats",
        )
        own = {k: kwargs.pop(k) for k in names if k in kwargs}
        if kwargs:
            raise TypeError(f"unknown engine arguments: {', '.join(sorted(kwargs))}")
        scheduler: SchedulerConfig = built["scheduler"]
        if scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
            built["scheduler"] = replace(scheduler, max_num_batched_tokens=scheduler.max_num_seqs)
        return cls(**built, **own)


def _with_eplb(kwargs: dict[str, Any]) -> dict[str, Any]:
    """vLLM's `eplb_config` is an object; `num_redundant_experts` may also be given alone."""
    kwargs = dict(kwargs)
    given = dict(kwargs.pop("eplb_config", {}))
    if "num_redundant_experts" in kwargs:
        given["num_redundant_experts"] = kwargs.pop("num_redundant_experts")
    return kwargs | {"eplb": EplbConfig(**given)} if given else kwargs


def _check_eplb(parallel: ParallelConfig) -> None:
    eplb = parallel.eplb
    if eplb.num_redundant_experts < 0:
        raise ValueError(f"num_redundant_experts must be >= 0, got {eplb.num_redundant_experts}")
    if eplb.window_size > eplb.step_interval:
        raise ValueError(
            f"window_size ({eplb.window_size}) must not exceed step_interval ({eplb.step_interval})"
        )
    if not parallel.enable_eplb:
        if eplb.num_redundant_experts:
            raise ValueError("num_redundant_experts needs enable_eplb")
    elif not parallel.enable_expert_parallel or parallel.num_balanced_ranks == 1:
        raise ValueError("enable_eplb needs enable_expert_parallel over more than one device")
