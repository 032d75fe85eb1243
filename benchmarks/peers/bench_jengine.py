"""jengine, through its offline API."""

import argparse
from typing import Any

import harness

import jengine


def build(args: argparse.Namespace) -> tuple[harness.Generate, dict[str, Any]]:
    llm = jengine.LLM(
        args.model,
        dtype="bfloat16",
        max_model_len=harness.MAX_MODEL_LEN,
        max_num_seqs=max(args.batches),
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        sampling = jengine.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
        )
        assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)

    return generate, {"version": jengine.__version__, "dtype": "bfloat16"}


if __name__ == "__main__":
    harness.run("jengine", build)
