"""vLLM's flags that this engine does not have: harmless ones are dropped with a warning, others
explained.
"""

from collections.abc import Sequence

# Flags that tune vLLM, or switch on what is always so here. The number of values that follow each.
IGNORED: dict[str, int] = {
    "--api-server-count": 1,
    "--attention-backend": 1,
    "--compilation-config": 1,
    "--cpu-offload-gb": 1,
    "--disable-cascade-attn": 0,
    "--disable-custom-all-reduce": 0,
    "--disable-fastapi-docs": 0,
    "--disable-hybrid-kv-cache-manager": 0,
    "--disable-uvicorn-access-log": 0,
    "--distributed-executor-backend": 1,
    "--download-dir": 1,
    "--enable-chunked-prefill": 0,
    "--enable-prompt-tokens-details": 0,
    "--enable-request-id-headers": 0,
    "--enable-server-load-tracking": 0,
    "--enable-tokenizer-info-endpoint": 0,
    "--enforce-eager": 0,
    "--long-prefill-token-threshold": 1,
    "--max-cudagraph-capture-size": 1,
    "--max-num-partial-prefills": 1,
    "--max-parallel-loading-workers": 1,
    "--max-seq-len-to-capture": 1,
    "--no-enable-log-requests": 0,
    "--optimization-level": 1,
    "--performance-mode": 1,
    "--prefix-caching-hash-algo": 1,
    "--safetensors-load-strategy": 1,
    "--stream-interval": 1,
    "--swap-space": 1,
    "--tokenizer-mode": 1,
    "--trust-remote-code": 0,
    "--use-tqdm-on-load": 0,
    "--worker-cls": 1,
    "-cc": 1,
    "-O": 1,
}

# Flags that would change results, or that a user counts on.
UNSUPPORTED = frozenset(
    {
        "--chat-template-content-format",
        "--cors-allow-origins",
        "--data-parallel-address",
        "--data-parallel-backend",
        "--data-parallel-external-lb",
        "--data-parallel-hybrid-lb",
        "--data-parallel-rank",
        "--data-parallel-rpc-port",
        "--enable-lora",
        "--enable-sleep-mode",
        "--kv-events-config",
        "--kv-offloading-size",
        "--kv-transfer-config",
        "--limit-mm-per-prompt",
        "--lora-modules",
        "--max-lora-rank",
        "--max-loras",
        "--middleware",
        "--otlp-traces-endpoint",
        "--override-generation-config",
        "--pipeline-parallel-size",
        "--response-role",
        "--speculative-config",
        "--structured-outputs-config",
        "--tool-parser-plugin",
        "-dpa",
        "-dpb",
        "-dpe",
        "-dph",
        "-dpn",
        "-dpp",
        "-pp",
    }
)


def split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(arguments for us, names of dropped flags, names of flags that cannot be honoured)."""
    kept: list[str] = []
    dropped: list[str] = []
    refused: list[str] = []
    words = iter(argv)
    for word in words:
        name, has_value, _ = word.partition("=")
        # vLLM takes both spellings
        name = name.replace("_", "-") if name.startswith("--") else name
        if name in IGNORED:
            dropped.append(name)
            if not has_value:
                for _ in range(IGNORED[name]):
                    next(words, None)
        elif name in UNSUPPORTED:
            refused.append(name)
        else:
            kept.append(word if not word.startswith("--") else name + word[len(name) :])
    return kept, dropped, refused
