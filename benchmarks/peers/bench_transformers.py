"""Hugging Face transformers on torch, bf16, as a user calls it: `model.generate`."""

import argparse
from typing import Any

import harness
import torch
import transformers


def build(args: argparse.Namespace) -> tuple[harness.Generate, dict[str, Any]]:
    torch.set_num_threads(args.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model.eval()

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
            )
        assert output.shape == (len(prompts), len(prompts[0]) + num_tokens)

    version = f"{transformers.__version__} (torch {torch.__version__})"
    return generate, {"version": version, "dtype": "bfloat16"}


if __name__ == "__main__":
    harness.run("transformers", build)
