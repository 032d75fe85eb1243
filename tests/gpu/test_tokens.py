"""On a GPU the engine's tokens are the CPU's: float32, greedy and seeded, many requests at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PROGRAM = """
import json, sys
from jengine import LLM, SamplingParams

def main():
    llm = LLM(sys.argv[1], dtype="float32", skip_tokenizer_init=True, max_num_seqs=8,
              max_num_batched_tokens=128, max_model_len=256, num_pages=128)
    prompts = [[(7 * i + 3 * j) % 500 + 1 for j in range(5 + 23 * i)] for i in range(8)]
    params = [SamplingParams(temperature=0.0 if i % 2 else 0.8, seed=i, top_k=20 if i % 3 else -1,
                             max_tokens=40, ignore_eos=True, detokenize=False) for i in range(8)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps([o.outputs[0].token_ids for o in outputs]))

main()
"""


# Widths that the GPU kernels take.
FAMILIES = {
    "llama": {},
    "qwen3-moe": dict(
        family="Qwen3Moe", num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64,
        head_dim=32, norm_topk_prob=True,
    ),
    "deepseek-v2": dict(
        family="DeepseekV2", n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
        moe_intermediate_size=64, first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=None,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, head_dim=8,
        num_key_value_heads=4, topk_method="greedy", n_group=1, topk_group=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_cpus(family: str, tmp_path: Path) -> None:
    from tests.oracles.tiny_llama import make_tiny_llama

    make_tiny_llama(tmp_path, **FAMILIES[family])
    assert tokens(tmp_path, "cuda") == tokens(tmp_path, "cpu")


def tokens(model: Path, platform: str) -> list[list[int]]:
    """In a process of its own: a process has one back end."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model)],
        env={**os.environ, "JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
