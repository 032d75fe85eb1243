"""What we ask of XLA, per executable. Pure: part of the key of stored executables."""

from pathlib import Path

Options = dict[str, str | int | bool]

GPU_PLATFORMS = ("gpu", "cuda")  # as devices say it, and as back ends are chosen by

# A decode step is one CUDA graph. WHILE lets a loop of steps be one, too: then the smallest graph
# must be 1, since a lone loop counts as three commands and would otherwise stay on the host.
# Rematerialisation sees the KV cache twice, as argument and as result, and so believes every step
# to be far over the device's memory: it computes things again (37 kernels more in a decode step of
# Llama 8B) to save a few bytes. Memory is planned, and temporaries are small.
_GPU: Options = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "xla_gpu_graph_min_graph_size": 1,
    "xla_disable_hlo_passes": "rematerialization,dot-merger",
}


def compiler_options(platform: str, user_flags: str = "", num_processes: int = 1) -> Options:
    """For `lowered.compile`. An option that the user has set in XLA_FLAGS is left to the user."""
    if platform not in GPU_PLATFORMS:
        return {}
    # Processes that shared out what is to be tuned would have to compile at the same time.
    of_many: Options = {"xla_gpu_shard_autotuning": False} if num_processes > 1 else {}
    options = _GPU | of_many
    return {name: value for name, value in options.items() if name not in user_flags}


CUBLAS_SEQS = 64  # fewest that decode with cuBLASLt alone
GRAPH_TOKENS = 256  # the most that a step with prompts may hold to be a graph
TUNED_TOKENS = 1024  # fewest of a step whose products are tuned, if bits may not depend on it


def bucket_options(
    options: Options, num_tokens: int, num_seqs: int, is_batch_invariant: bool = False
) -> Options:
    """Changes to `options` (none on a CPU) for the program of one bucket, measured on an H100.

    Long prompts do without graphs: their kernels are long enough to be launched one by one,
    unnoticed, while bringing a graph of hundreds of nodes up to date delays the first token by
    milliseconds (1,024 tokens of Llama 8B: 24.5 ms without, 128 tokens: 13.4 ms, 9.9 with). And
    XLA's own matrix kernels stay out of them: cuBLASLt adds the residual in its epilogue and has
    little to tune. It has no product of fewer than 8 rows into float32, though.

    Decode steps of many sequences do without XLA's matrix kernels, too: autotuning takes them by
    their own time, without the sum of the splits that follows (64 rows of 14,336 times 4,096: 57 us
    in a graph, 47 with cuBLASLt). Those of fewer have our own.

    Where bits may not depend on the bucket, nothing is taken that cuts a product's depth: XLA's
    matrix kernels do, and so do cuBLASLt's where tuning finds them faster, for few rows of great
    depth. What it takes by itself did not, for any of the shapes that `tests/gpu` compares.
    """
    if not options:
        return options
    is_decode = num_tokens == num_seqs
    if is_batch_invariant:
        changes: Options = {"xla_gpu_enable_triton_gemm": False}
        if num_tokens < TUNED_TOKENS:
            changes["xla_gpu_autotune_level"] = 0
        if not is_decode and num_tokens > GRAPH_TOKENS:
            changes["xla_gpu_enable_command_buffer"] = ""
        return options | changes
    if not is_decode and num_tokens <= GRAPH_TOKENS:
        return options
    changes = {} if is_decode else {"xla_gpu_enable_command_buffer": ""}
    if num_seqs >= (CUBLAS_SEQS if is_decode else 8):
        changes["xla_gpu_enable_triton_gemm"] = False
    return options | changes


def any_size_options(platform: str, is_batch_invariant: bool) -> Options:
    """For a program that is traced anew for each number of tokens, `TUNED_TOKENS` at least
    (`runtime/forward.py`).
    """
    if platform not in GPU_PLATFORMS or not is_batch_invariant:
        return {}
    return {"xla_gpu_enable_triton_gemm": False}


def measuring_options(platform: str, user_flags: str = "") -> Options:
    """For a program that is compiled for its memory figures only: no kernel is timed."""
    options = compiler_options(platform, user_flags)
    return options | {"xla_gpu_autotune_level": 0} if platform in GPU_PLATFORMS else options


def tuning_cache(platform: str, folder: Path | None) -> Options:
    """Keep what autotuning found, fusion by fusion: buckets and other models share it. Not part of
    a key.
    """
    if platform not in GPU_PLATFORMS or folder is None:
        return {}
    return {
        "xla_gpu_per_fusion_autotune_cache_dir": str(folder),
        "xla_gpu_experimental_autotune_cache_mode": "AUTOTUNE_CACHE_MODE_UPDATE",
    }
