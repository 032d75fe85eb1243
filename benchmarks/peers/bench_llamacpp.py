"""llama.cpp through llama-cpp-python's C bindings: its `Llama` class knows only batch 1."""

import argparse
import ctypes
from pathlib import Path
from typing import Any

import harness
import llama_cpp
import numpy as np

SILENT = llama_cpp.llama_log_callback(lambda level, text, user_data: None)  # thousands of lines


def build(args: argparse.Namespace) -> tuple[harness.Generate, dict[str, Any]]:
    llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        args.model.encode(), llama_cpp.llama_model_default_params()
    )
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = harness.MAX_MODEL_LEN * max(args.batches)
    settings.n_batch = settings.n_ubatch = harness.MAX_MODEL_LEN
    settings.n_seq_max = max(args.batches)
    settings.n_threads = settings.n_threads_batch = args.threads
    settings.kv_unified = True  # one buffer for all sequences, as in its own batched benchmark
    context = llama_cpp.llama_init_from_model(model, settings)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    capacity = max(harness.MAX_MODEL_LEN, max(args.batches) * harness.DECODE_PROMPT_TOKENS)
    batch = llama_cpp.llama_batch_init(capacity, 0, 1)

    def decode(tokens: list[list[int]], start: int) -> list[int]:
        """Feed each sequence its tokens from position `start`; returns the best next ones."""
        count, last = 0, []
        for sequence, ids in enumerate(tokens):
            for offset, token in enumerate(ids):
                batch.token[count] = token
                batch.pos[count] = start + offset
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence
                batch.logits[count] = offset == len(ids) - 1
                count += 1
            last.append(count - 1)
        batch.n_tokens = count
        status = llama_cpp.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        rows = (llama_cpp.llama_get_logits_ith(context, i) for i in last)
        return [int(np.argmax(np.ctypeslib.as_array(row, (vocab_size,)))) for row in rows]

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        newest = decode(prompts, 0)
        for step in range(num_tokens - 1):
            newest = decode([[token] for token in newest], len(prompts[0]) + step)

    return generate, {"version": llama_cpp.__version__, "dtype": Path(args.model).stem}


if __name__ == "__main__":
    harness.run("llama.cpp", build)
